"""Printing, writing and checking a file that is derived from the contract."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def run(name: str, text: str, arguments: Sequence[str] | None = None) -> int:
    """The command line of ``python -m tempflow_api.<name>``; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m tempflow_api.{name}")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", metavar="PATH", type=Path, help="write the file")
    choice.add_argument("--check", metavar="PATH", type=Path, help="exit 1 when the file differs")
    options = parser.parse_args(arguments)
    if options.write is not None:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text, encoding="utf-8")
        return 0
    if options.check is not None:
        found = options.check.read_text(encoding="utf-8") if options.check.is_file() else None
        if found == text:
            return 0
        remedy = f"python -m tempflow_api.{name} --write {options.check}"
        sys.stderr.write(f"{options.check} differs from the contract; write it anew: {remedy}\n")
        return 1
    sys.stdout.write(text)
    return 0
