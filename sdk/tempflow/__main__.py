"""``python -m tempflow`` is the command line."""

from tempflow.cli import main

main()
