"""A program of the trainer ends as its ``main`` says, and loses nothing of what it wrote."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from tempflow_api import naming

PROGRAM = """
import atexit, sys, tempfile, threading, time

def main():
    sys.stdout.write(" ".join(sys.argv[1:]))
    {body}
"""


def run(
    folder: Path, body: str, output: TextIO | int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM.format(body=body))
    return subprocess.run(
        [sys.executable, "-m", naming.START_MODULE, "program", "--a", "b c"],
        env={**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"},
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [("return 0", 0), ("pass", 0), ("return 83", 83), ("raise SystemExit(2)", 2), ("1 / 0", 1)],
)
def test_its_exit_code_and_output(tmp_path: Path, body: str, code: int) -> None:
    done = run(tmp_path, body)
    assert (done.returncode, done.stdout) == (code, "--a b c")
    assert ("ZeroDivisionError" in done.stderr) == (code == 1)


def test_what_still_runs_beside_it_does_not_keep_it(tmp_path: Path) -> None:
    assert run(tmp_path, "threading.Thread(target=time.sleep, args=(60,)).start()").returncode == 0


def test_what_was_registered_for_the_end_is_done(tmp_path: Path) -> None:
    body = "atexit.register(print, '', 'bye'); global kept; kept = tempfile.TemporaryDirectory()"
    done = run(tmp_path, f"{body}; sys.stdout.write(' ' + kept.name)")
    _, _, _, folder, last = done.stdout.split()
    assert (done.returncode, last) == (0, "bye")
    assert not Path(folder).exists()


def test_a_caller_without_an_output_gets_the_code(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("def main():\n    return 3\n")
    command = f"{sys.executable} -m {naming.START_MODULE} program >&- 2>&-"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    assert subprocess.run(["sh", "-c", command], env=environment, check=False).returncode == 3


def test_output_that_cannot_be_written_is_no_success(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(tmp_path, "return 0", full)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
