"""One run of the real trainer, under its launcher, with its checkpoints in S3."""

import hashlib
import os
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from tempflow import manifest
from tempflow.checkpoints import open_store, read, steps
from tempflow.pulling import pull
from tempflow_api import checkpoint_layout as layout
from tempflow_api import naming
from tempflow_api.status import Progress
from tests.faults.s3_proxy import Fault, Proxy, Seen

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300
NAME = "stored"


class Run:
    """One run, as the operator starts it: the launcher, a job in a file, a store."""

    def __init__(self, folder: Path, s3: Proxy) -> None:
        self.folder, self.s3 = folder, s3
        self.uri = f"s3://runs/{uuid.uuid4().hex}"
        self.starts = 0

    @property
    def stored(self) -> str:
        return f"{self.uri}/{NAME}"

    def start(
        self, *, attempt: int = 1, processes: int = 1, changes: dict[str, Any] | None = None
    ) -> subprocess.Popen[str]:
        """A start on a machine that has nothing of the run.

        Args:
            attempt: its number.
            processes: ranks.
            changes: by section of the specification.
        """
        self.starts += 1
        work = self.folder / f"machine-{self.starts}"
        work.mkdir(parents=True)
        (work / "job.yaml").write_text(yaml.safe_dump(self._manifest(processes, changes or {})))
        job = manifest.read(str(work / "job.yaml")).job
        (work / "job.json").write_text(job.model_dump_json(by_alias=True))
        return subprocess.Popen(
            [sys.executable, "-m", "tempflow_trainer.launch"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                naming.ENV_JOB_FILE: str(work / "job.json"),
                naming.ENV_WORK_DIR: str(work),
                naming.ENV_ATTEMPT: str(attempt),
            },
        )

    def _manifest(self, processes: int, changes: dict[str, Any]) -> dict[str, object]:
        given = yaml.safe_load((ROOT / "examples/digits.yaml").read_text())
        given["metadata"] = {"name": NAME}
        spec = given["spec"]
        spec["algorithm"] |= {
            "epochs": 4,
            "promptsPerEpoch": 4,
            "seedsPerPrompt": 1,
            "updatesPerEpoch": 2,
            "branchSet": {"choose": "sliding", "count": 4, "everyEpochs": 1},
        }
        spec["model"]["ema"] = {"decay": 0.9, "everyUpdates": 1}
        spec["evaluation"] = {"everyEpochs": 2, "steps": 4, "prompts": 2, "imagesPerPrompt": 2}
        spec["checkpoint"] = {
            "everyEpochs": 1,
            "keepLast": 9,
            "uri": self.uri,
            "endpointUrl": self.s3.endpoint,
        }
        spec["compute"] |= {"processesPerNode": processes}
        for section, values in changes.items():
            spec[section] = spec.get(section, {}) | values
        return dict(given)

    def wait_for_phase(self, phase: str, epoch: int, process: subprocess.Popen[str]) -> None:
        """Until the newest start is in that phase after ``epoch`` epochs; "start" is before all
        phases, when there is a rank."""
        told = self.folder / f"machine-{self.starts}" / layout.PROGRESS

        def reached() -> bool:
            if phase == "start":
                return len(ranks_of(process)) > 0
            if not told.exists():
                return False
            progress = Progress.model_validate_json(told.read_text())
            assert progress.epoch <= epoch, f"the {phase} of epoch {epoch} was missed"
            return (progress.phase, progress.epoch) == (phase, epoch)

        deadline = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.001)

    def committed(self) -> list[int]:
        return [s.step for s in steps(open_store(self.stored, self.s3.endpoint, "us-east-1"))]

    def last_lines(self, attempt: int, rank: int) -> list[str]:
        store = open_store(self.stored, self.s3.endpoint, "us-east-1")
        return (read(store, layout.log_key(attempt, rank)) or b"").decode().splitlines()

    def newest(self) -> Path:
        """What the newest checkpoint holds, here."""
        store = open_store(self.stored, self.s3.endpoint, "us-east-1")
        return pull(store, steps(store)[-1], self.folder / f"result-{uuid.uuid4().hex}")

    def result(self) -> dict[str, str]:
        """Digests of what the run ended with, and of its record but for the times."""
        store = open_store(self.stored, self.s3.endpoint, "us-east-1")
        folder = self.newest()
        found = {
            file.relative_to(folder).as_posix(): digest(file.read_bytes())
            for file in sorted(folder.rglob("*.safetensors"))
        }
        for name in (layout.METRICS, layout.EVALUATIONS):
            lines = bytes(store.files.cat_file(store.path(name))).decode().splitlines()
            rows = [yaml.safe_load(line) for line in lines]
            for row in rows:
                for timed in ("time", "seconds", "imagesPerSecond", "scoringHiddenSeconds"):
                    row.pop(timed, None)
            found[name] = digest(yaml.safe_dump(rows).encode())
        for picture in store.files.find(store.path(layout.GRIDS)):
            found[Path(picture).name] = digest(bytes(store.files.cat_file(picture)))
        return found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, output


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # of torchrun's, and gone already
            words = child.cmdline()
            if "tempflow_trainer.main" in words and "-u" in words:
                found.append(child)
    return sorted(found, key=lambda p: p.pid)


def kill_all(process: subprocess.Popen[str]) -> None:
    for victim in psutil.Process(process.pid).children(recursive=True):
        victim.kill()
    process.kill()
    finish(process)


class Hold:
    """Holds one request until it is let go.

    Then the server gets it, unless it is ``lost``; or it is held when the server has applied it.
    """

    def __init__(
        self,
        s3: Proxy,
        operation: str,
        key: str,
        *,
        skip: int = 0,
        applied: bool = False,
        lost: bool = False,
    ) -> None:
        self._reached, self._go = threading.Event(), threading.Event()

        def hold(_seen: Seen) -> None:
            self._reached.set()
            self._go.wait(PATIENCE_SECONDS)

        fault = Fault(operation, key=key, skip=skip, times=1, status=503 if lost else None)
        if applied:
            fault.after = hold
        else:
            fault.before = hold
        s3.add(fault)

    def wait(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._reached.wait(0.1):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "nothing happened"

    def release(self) -> None:
        self._go.set()


def of_step(step: int, what: str) -> str:
    return rf"step-{step:010d}-.*/{what}"
