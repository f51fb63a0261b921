"""docs/cli.md, made from the command line itself: every verb with its help.

python tools/cli_docs.py           write it
python tools/cli_docs.py --check   exit 1 when it differs
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from typer.testing import CliRunner

from tempflow.cli import app

FILE = Path(__file__).resolve().parents[1] / "docs/cli.md"

_HEAD = """# The command line

Made from the command line itself by `tools/cli_docs.py`; `tempflow VERB --help` shows the same.
Exit codes, and what to do about each, are in [Run a job on this machine](run.md#exit-codes).

- `run` and `sample` need the trainer here (`pip install '.[trainer]'` in the project's folder);
  verbs with `--context` need a cluster; the others need nothing.
- Results go to standard output, everything else to standard error. With `-o json` or `-o yaml` the
  result is the object itself, for `jq` and `kubectl`.
- A cluster is found as kubectl finds it: `--kubeconfig`, `KUBECONFIG`, `~/.kube/config`, and inside
  a pod its service account; proxies come from `HTTPS_PROXY` and `NO_PROXY`.
- `tempflow completion SHELL` prints a script that completes verbs and options.
"""


def verbs() -> Iterator[str]:
    """In the order of the help; of a group, its own verbs."""
    root = typer.main.get_command(app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]  # a group has them
        inner = getattr(command, "commands", None)
        yield from [f"{name} {verb}" for verb in inner] if inner else [name]


def document() -> str:
    blocks = [_HEAD]
    for verb in verbs():
        shown = CliRunner().invoke(app, [*verb.split(), "--help"], terminal_width=96)
        if shown.exit_code != 0:
            raise RuntimeError(f"tempflow {verb} --help: {shown.output}")
        text = shown.output.strip().replace("Usage: root ", "Usage: tempflow ", 1)
        blocks.append(f"## `tempflow {verb}`\n\n```text\n{text}\n```\n")
    return "\n".join(blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if FILE.is_file() and FILE.read_text(encoding="utf-8") == document():
            return 0
        print("docs/cli.md differs from the command line: python tools/cli_docs.py")
        return 1
    FILE.write_text(document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
