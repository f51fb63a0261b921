"""The same job, run here: the trainer as processes of this machine, no cluster.

::

    <work-dir>/<name>/
      job.json          the resolved job that the trainer reads
      lock              held as long as the run is alive
      log/trainer.log   everything that the trainer says
      record/           what it writes about itself
"""

import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tempflow.manifest import Manifest
from tempflow.processes import StopRequests, kill_tree
from tempflow.record import Record
from tempflow.refused import Refused
from tempflow_api import naming
from tempflow_api.errors import ExitCode, Problem, StoreUnavailable
from tempflow_api.record import Evaluation, Metrics, Summary
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import TempFlowGRPOJob

JOB_FILE = "job.json"
LOG_FILE = "log/trainer.log"
LOCK_FILE = "lock"

TRAINER = (sys.executable, "-m", "tempflow_trainer.launch")
_TRAINER_NEEDS = ("torch", "diffusers", "transformers", "peft", "safetensors")

_POLL_SECONDS = 0.2
_LOG_TAIL_BYTES = 1 << 20


class Watcher(Protocol):
    """Told what happens, in order."""

    def began(self, job: TempFlowGRPOJob, folder: Path, earlier: Sequence[Metrics]) -> None:
        """The trainer has been started; ``earlier`` epochs were recorded by starts before."""

    def progressed(self, progress: Progress) -> None:
        """The trainer is somewhere else than at the last call."""

    def trained(self, metrics: Metrics, progress: Progress | None) -> None:
        """An epoch is complete; ``progress`` is as of now."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Images have been drawn and scored by every reward."""

    def notice(self, text: str) -> None:
        """Something that the user should read."""

    def ended(self) -> None:
        """The trainer is gone; nothing further will be told."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    """Exit code of ``tempflow run``."""
    folder: Path
    summary: Summary | None
    """Present when the run is done."""
    problem: str | None
    """What went wrong, in one line."""
    log: Path


def problems_here(job: TempFlowGRPOJob) -> list[Problem]:
    """What keeps a valid job from running on this machine."""
    spec, problems = job.spec, []
    if spec.compute.nodes > 1:
        problems.append(
            Problem(
                "spec.compute.nodes",
                f"got {spec.compute.nodes}: this machine is one node; set it to 1, or submit the "
                "job to a cluster",
            )
        )
    if spec.run_policy.suspend:
        problems.append(
            Problem("spec.runPolicy.suspend", "got true: a suspended job does not run; remove it")
        )
    if spec.data.prompts_config_map is not None:
        problems.append(
            Problem(
                "spec.data.promptsConfigMap",
                "is of a cluster: here, name a file in promptsFile and remove this field",
            )
        )
    prompts = spec.data.prompts_file
    if (
        prompts
        and not spec.data.prompts_config_map
        and "://" not in prompts
        and not Path(prompts).exists()
    ):
        problems.append(
            Problem(
                "spec.data.promptsFile",
                f"there is no file {prompts}: write the prompts there, one a line",
            )
        )
    problems += [
        Problem(
            f"spec.rewards[{position}].placement",
            "got service: on a cluster the operator serves it; here, remove the field to score in "
            "the trainer's processes, or serve the reward and give service.endpoints",
        )
        for position, term in enumerate(spec.rewards)
        if term.placement == "service"
    ]
    if spec.run_policy.cancel:
        problems.append(
            Problem("spec.runPolicy.cancel", "got true: a cancelled job does not run; remove it")
        )
    return problems


def run_folder(job: TempFlowGRPOJob, work_dir: Path) -> Path:
    """Where this job runs."""
    return work_dir / naming.run_folder(None, job.metadata.name, None)


def refuse_if_begun(job: TempFlowGRPOJob, work_dir: Path) -> None:
    """Refused if an earlier run would be continued, here or from the checkpoint store."""
    folder = run_folder(job, work_dir)
    if (folder / JOB_FILE).exists():
        raise Refused(
            f"{folder} holds an earlier run: move it aside (mv {folder} {folder}.old), or leave "
            "out --fresh to continue it"
        )
    if job.spec.checkpoint.uri is None:
        return
    # Late: this loads the S3 client, which a run without --fresh does not need.
    from tempflow import checkpoints

    uri = f"{job.spec.checkpoint.uri.rstrip('/')}/{folder.name}"
    store = checkpoints.open_store(
        uri, job.spec.checkpoint.endpoint_url, job.spec.checkpoint.region
    )
    if checkpoints.steps(store):
        raise Refused(
            f"{uri} holds checkpoints of an earlier run: change metadata.name or checkpoint.uri, "
            "or leave out --fresh to continue it"
        )


def require_trainer(modules: Sequence[str] = _TRAINER_NEEDS) -> None:
    """Refused if the packages of the trainer extra are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(
            f"training needs {', '.join(missing)}, not installed here: "
            "pip install '.[trainer]' in the project's folder"
        )


def run(
    manifest: Manifest,
    watcher: Watcher,
    *,
    work_dir: Path,
    command: Sequence[str] = TRAINER,
) -> Outcome:
    """Run the job until it ends, or until Ctrl-C or SIGTERM stops it.

    The first request to stop is passed on, and the trainer stops after a checkpoint; the second
    one kills everything that it has started. Raises ManifestInvalid, Refused or StoreUnavailable
    where nothing was started.
    """
    job = manifest.job
    manifest.check(problems_here(job))
    folder = run_folder(job, work_dir)
    log = folder / LOG_FILE
    with _locked(folder) as lock:
        with _writable(folder):
            log.parent.mkdir(exist_ok=True)
            _replace(folder / JOB_FILE, job.model_dump_json(by_alias=True, indent=2) + "\n")
            log_start = log.stat().st_size if log.exists() else 0
        record = Record(folder)
        earlier = list(record.epochs())
        list(record.evaluations())
        with StopRequests().listening() as requests:
            child = _start(command, folder, log, lock)
            try:
                watcher.began(job, folder, earlier)
                killed = _follow(child, record, watcher, requests)
            finally:
                # Also on the way out of an exception, and for what outlived the trainer itself.
                kill_tree(child)
                watcher.ended()
        return _outcome(child.returncode, requests, killed, folder, log_start)


def _start(command: Sequence[str], folder: Path, log: Path, lock: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        naming.ENV_JOB_FILE: str(folder.resolve() / JOB_FILE),
        naming.ENV_WORK_DIR: str(folder.resolve()),
        naming.ENV_ATTEMPT: "0",
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C in the terminal must reach this process only, which passes it on once.
            start_new_session=True,
            # The lock lives as long as the trainer, even if this process is killed.
            pass_fds=(lock,),
        )


def _follow(
    child: subprocess.Popen[bytes], record: Record, watcher: Watcher, requests: StopRequests
) -> bool:
    """Tell the watcher what the record says until the child ends; True if it had to be killed."""
    tell = _telling(record, watcher)
    obeyed = 0
    while True:
        ended = child.poll() is not None
        tell()
        if ended:
            return False
        if requests.count > obeyed:
            if obeyed or requests.count > 1:
                watcher.notice("killed")
                kill_tree(child)
                tell()
                return True
            obeyed = requests.count
            watcher.notice("stopping after a checkpoint, press Ctrl-C again to kill")
            child.send_signal(signal.SIGTERM)
        time.sleep(_POLL_SECONDS)


def _telling(record: Record, watcher: Watcher) -> Callable[[], None]:
    """A function that tells what is new since its last call."""
    # What an earlier start left is not news.
    last = record.progress()

    def tell() -> None:
        nonlocal last
        progress = record.progress()
        for metrics in record.epochs():
            watcher.trained(metrics, progress)
            for alarm in metrics.alarms:
                watcher.notice(f"alarm after epoch {metrics.epoch}: {alarm}")
        for evaluation in record.evaluations():
            watcher.evaluated(evaluation)
            for alarm in evaluation.alarms:
                watcher.notice(f"alarm after epoch {evaluation.epoch}: {alarm}")
        if progress is not None and progress != last:
            last = progress
            watcher.progressed(progress)

    return tell


def _outcome(
    returncode: int, requests: StopRequests, killed: bool, folder: Path, log_start: int
) -> Outcome:
    log = folder / LOG_FILE
    code = returncode if returncode >= 0 else 128 - returncode
    # SIGTERM itself ends a trainer that is asked to stop while it is still starting.
    stopped = requests.count and code in (ExitCode.PREEMPTED, 128 + signal.SIGTERM)
    problem: str | None = None
    if killed or (stopped and requests.interrupts):
        code = ExitCode.INTERRUPTED
    elif code not in (ExitCode.DONE, ExitCode.PREEMPTED):
        problem = _last_error(log, log_start)
        if problem is None and not stopped:
            problem = _unexplained(returncode, folder)
    summary = Record(folder).summary() if code == ExitCode.DONE else None
    return Outcome(int(code), folder, summary, problem, log)


def _unexplained(returncode: int, folder: Path) -> str:
    if returncode == -signal.SIGKILL:
        return "the trainer was killed (SIGKILL); most often, memory ran out"
    if returncode < 0:
        return f"the trainer was ended by {signal.Signals(-returncode).name}"
    # Late: the meanings come with the whole contract, and only this needs them.
    from tempflow_api.reference import EXIT_MEANINGS

    said = f"the trainer failed with exit code {returncode}"
    meaning = {int(code): words for code, words in EXIT_MEANINGS.items()}.get(returncode)
    if meaning is None:
        return said
    # A code of its own comes with a line in the log, unless that could not be written.
    return f"{said} ({meaning}) and could not log why: is the disk of {folder} full?"


def _last_error(log: Path, start: int) -> str | None:
    """The last line of this start's log that begins with ``error:``, without that word."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - _LOG_TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    return errors[-1].removeprefix("error:").strip() if errors else None


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The run's lock, as a file descriptor; Refused while another process holds it."""
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            raise Refused(
                f"{folder} is in use by another 'tempflow run' (process {owner or 'unknown'}): "
                "wait for it or stop it, or give this job another metadata.name"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """StoreUnavailable for a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        reason = (error.strerror or str(error)).lower()
        raise StoreUnavailable(
            f"cannot write {where}: {reason}; choose another --work-dir"
        ) from error


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
