"""The first process of a container hears a request to stop from its first moment on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tempflow_api import naming
from tempflow_api.errors import ExitCode
from tests.unit.trainer.test_gang import job

# Before the first module of ours that takes time, the process waits for a file.
WAITING = """
import pathlib, sys, time
class Wait:
    def find_spec(self, name, path=None, target=None):
        if name == "pydantic":
            pathlib.Path({reached!r}).touch()
            while not pathlib.Path({go!r}).exists():
                time.sleep(0.01)
sys.meta_path.insert(0, Wait())
"""


def test_a_request_to_stop_while_it_imports_is_kept(tmp_path: Path) -> None:
    reached, go = tmp_path / "reached", tmp_path / "go"
    hook = WAITING.format(reached=str(reached), go=str(go))
    (tmp_path / "sitecustomize.py").write_text(hook)
    (tmp_path / "job.json").write_text(job().model_dump_json(by_alias=True))
    process = subprocess.Popen(
        [sys.executable, "-m", "tempflow_trainer.launch"],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            naming.ENV_JOB_FILE: str(tmp_path / "job.json"),
            naming.ENV_WORK_DIR: str(tmp_path),
        },
    )
    while not reached.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    go.touch()
    _, said = process.communicate(timeout=60)
    assert process.returncode == ExitCode.PREEMPTED, said
    assert said == "note: stopped while it was starting: nothing had been done\n"
