"""Starts a program of the trainer, quickly, and ends its process at once:
``python -m tempflow_trainer.start tempflow_trainer.explain ...``.

torch, transformers and diffusers make a million objects that live as long as their process.
Python's collector would look them through again and again while they are made, and the interpreter
would take them apart one by one at the end: together three of the eight seconds of a process that
only imports them. So collecting begins when all is imported, and the end is left to the system, but
for what was registered for it.
"""

import atexit
import contextlib
import gc
import importlib
import os
import sys


def main() -> None:
    """Run the ``main`` of the module that the first argument names; its result is the exit code.

    What it raises ends the process in the usual way.
    """
    module = sys.argv.pop(1)
    gc.disable()
    run = importlib.import_module(module).main
    gc.freeze()
    gc.enable()
    code = run() or 0
    atexit._run_exitfuncs()  # temporary folders, clients and children, of rewards' packages too
    if sys.stdout:  # none where the caller has closed it
        sys.stdout.flush()  # raises where it cannot, a full disk for one: output must not get lost
    if sys.stderr:
        with contextlib.suppress(OSError):  # nowhere is left to say it
            sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
