"""The ranks of this node: starts them and says how they ended.

torchrun is a child of this process, which turns what the ranks left behind into one exit code and
one line. torchrun alone would answer 1 for every failure. No torch is imported here.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tempflow_api import checkpoint_layout, naming, termination
from tempflow_api.errors import (
    NOT_IN_TIME,
    AddressInUse,
    ExitCode,
    ManifestInvalid,
    Problem,
    StoreUnavailable,
    TempFlowError,
)
from tempflow_api.status import Progress
from tempflow_api.termination import LastWords
from tempflow_api.v1alpha1 import JobSpec, TempFlowGRPOJob

# Kubernetes shows the end of this file as the container's termination message.
TERMINATION_LOG = Path("/dev/termination-log")
# Between torchrun's kill of a rank that will not stop and the kill of everything.
SHUTDOWN_RESERVE_SECONDS = 10
# For torchrun, when its ranks have ended on request: it was seen to live on for minutes.
LINGER_SECONDS = 30.0
NOTHING_DONE = "stopped while it was starting: nothing had been done"
# A file of each rank that catches SIGTERM.
BEGAN = "rank-*.began"


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks meet; the same on every node."""

    nodes: int
    node_rank: int
    processes: int
    address: str
    port: int

    @classmethod
    def of(cls, job: TempFlowGRPOJob, environment: Mapping[str, str]) -> "Rendezvous":
        """From the job and what the operator put into the environment.

        Raises:
            ManifestInvalid: several nodes, but no address to meet at.
            AddressInUse: the port, when it is this node that has to open it.
        """
        compute = job.spec.compute
        address = environment.get(naming.ENV_MASTER_ADDR)
        if compute.nodes > 1 and address is None:
            raise ManifestInvalid(
                "the job",
                [Problem("spec.compute.nodes", f"got {compute.nodes}, expected 1 on one machine")],
            )
        node_rank = int(environment.get(naming.ENV_NODE_RANK, "0"))
        asked = environment.get(naming.ENV_MASTER_PORT)
        port = int(asked) if asked else _free_port()
        if asked and node_rank == 0:
            _check_free(port)
        return cls(
            compute.nodes, node_rank, compute.processes_per_node, address or "127.0.0.1", port
        )

    def command(self) -> list[str]:
        """The torchrun command: a fixed gang, rank 0 on node 0, no restarts of its own."""
        return [
            sys.executable,
            *("-m", naming.START_MODULE, "torch.distributed.run"),
            f"--nnodes={self.nodes}",
            f"--node-rank={self.node_rank}",
            f"--nproc-per-node={self.processes}",
            f"--master-addr={self.address}",
            f"--master-port={self.port}",
            "--max-restarts=0",
            *("-m", naming.START_MODULE, "tempflow_trainer.main"),
        ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise AddressInUse(
                f"port {port}, where the processes of the run meet, is taken: {error.strerror}; "
                f"set {naming.ENV_MASTER_PORT} to a free one"
            ) from error


def read_job(path: Path) -> TempFlowGRPOJob:
    """The resolved job.

    Raises:
        ManifestInvalid: unreadable, or not a job.
    """
    try:
        return TempFlowGRPOJob.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ManifestInvalid(str(path), [Problem("the file", str(error.strerror))]) from error
    except ValidationError as error:
        problems = [
            Problem(".".join(str(part) for part in found["loc"]), found["msg"])
            for found in error.errors()
        ]
        raise ManifestInvalid(str(path), problems) from error


def run(environment: Mapping[str, str], requests: Sequence[float]) -> tuple[int, str]:
    """Start the ranks, wait for them; returns exit code and message.

    Args:
        environment: of this process.
        requests: to stop, with their times; the first is passed on to the ranks.

    Raises:
        TempFlowError: the run cannot start.
    """
    missing = [n for n in (naming.ENV_JOB_FILE, naming.ENV_WORK_DIR) if n not in environment]
    if missing:
        problem = Problem(missing[0], "not set; 'tempflow run' and the operator set it")
        raise ManifestInvalid("the environment", [problem])
    job = read_job(Path(environment[naming.ENV_JOB_FILE]))
    work = Path(environment[naming.ENV_WORK_DIR])
    results = _emptied(work / "ranks")
    rendezvous = Rendezvous.of(job, environment)
    environment = _with_packages(job.spec, work, environment)
    if requests:
        return ExitCode.PREEMPTED, NOTHING_DONE
    child = subprocess.Popen(rendezvous.command(), env=_child_environment(job, environment))
    files = _result_files(results, rendezvous)
    status = _wait(child, requests, lambda: all(file.exists() for file in files.values()))
    shutil.rmtree(work / "staging", ignore_errors=True)
    code, message = how_it_ended(status, results, rendezvous)
    if requests and code == ExitCode.RANK_DIED:
        seconds = time.monotonic() - requests[0]
        began = len(list(results.glob(BEGAN))) == rendezvous.processes
        return stopped(message, seconds, _stop_seconds(job.spec), began=began)
    return code, message


def _emptied(folder: Path) -> Path:
    """The folder, with nothing in it: where the disk fills later, a file in it may still begin."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailable(f"cannot write {folder}: {error.strerror}") from error
    return folder


def stopped(message: str, seconds: float, most: float, *, began: bool) -> tuple[int, str]:
    """Code and message when a rank died ``seconds`` after the request to stop.

    Args:
        message: of the rank, or about it.
        seconds: until all had ended.
        most: after so many seconds torchrun kills what is left.
        began: whether all ranks had come so far that SIGTERM does not end them at once; before that
            none does anything.
    """
    if not began:
        return ExitCode.PREEMPTED, NOTHING_DONE
    if seconds >= most:
        return NOT_IN_TIME, (
            f"killed before it could stop, {seconds:.0f} s after it was asked to; the run "
            "continues from its last checkpoint; allow more with "
            "spec.runPolicy.terminationGracePeriodSeconds"
        )
    return ExitCode.RANK_DIED, message


def _wait(
    child: subprocess.Popen[bytes], requests: Sequence[float], ended: Callable[[], bool]
) -> int:
    """Until the child ends; a request to stop is passed on, as SIGTERM, once. ``ended`` tells that
    all ranks have said how they ended: the child is not waited for much longer then."""
    passed_on, over = False, float("inf")
    while True:
        if requests and not passed_on:
            child.send_signal(signal.SIGTERM)
            passed_on = True
        try:
            # A signal does not end this wait, so it is a short one.
            return child.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            if requests and over == float("inf") and ended():
                over = time.monotonic() + LINGER_SECONDS
            if time.monotonic() >= over:
                child.kill()


def _stop_seconds(spec: JobSpec) -> int:
    return spec.run_policy.termination_grace_period_seconds - SHUTDOWN_RESERVE_SECONDS


def _with_packages(spec: JobSpec, work: Path, environment: Mapping[str, str]) -> Mapping[str, str]:
    if not spec.packages:
        return environment
    from tempflow_trainer import packages  # brings the store, which takes a second to load

    places = packages.unpack(spec.packages, spec.checkpoint, work / "packages")
    before = environment.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, places), *([before] if before else [])])
    return {**environment, "PYTHONPATH": path}


def _child_environment(job: TempFlowGRPOJob, environment: Mapping[str, str]) -> dict[str, str]:
    return {
        # torchrun kills its ranks after 30 seconds whatever the pod's grace period is.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_stop_seconds(job.spec)),
        # Torch's threads spin while they wait: with another program beside them, two are forty
        # times slower than one (measured). More processors are used by more processes.
        "OMP_NUM_THREADS": "1",
        # Advice of the libraries about options of theirs that a run does not use.
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        **environment,
    }


def how_it_ended(status: int, results: Path, rendezvous: Rendezvous) -> tuple[int, str]:
    """One code and message from what the ranks of this node wrote.

    A rank's own error comes before that of a rank which only lost its peers; words that were cut
    off tell of a full disk, and a rank that wrote nothing was killed.
    """
    if status == 0:
        return ExitCode.DONE, ""
    files = _result_files(results, rendezvous)
    told = {r: words for r, file in files.items() if (words := _last_words(file)) is not None}
    failed = [told[rank] for rank in sorted(told) if told[rank]["code"] != ExitCode.DONE]
    own = [result for result in failed if result["code"] != ExitCode.RANK_DIED]
    if own:
        return own[0]["code"], own[0]["message"]
    silent = [rank for rank in files if rank not in told]
    if any(files[rank].exists() for rank in silent):
        return ExitCode.STORE, (
            f"cannot write in {results.parent}: is the disk full? Make room there, and the same "
            "job continues from its last checkpoint"
        )
    if silent:
        return ExitCode.RANK_DIED, (
            f"rank {silent[0]} died without a word: it was killed, perhaps for want of memory; "
            "the run continues from its last checkpoint when it is started again"
        )
    if failed:
        return ExitCode.RANK_DIED, failed[0]["message"]
    return ExitCode.BUG, f"the launcher of the ranks ended with status {status}"


def _result_files(results: Path, rendezvous: Rendezvous) -> dict[int, Path]:
    """Of the ranks of this node, by rank."""
    first = rendezvous.node_rank * rendezvous.processes
    return {r: results / f"rank-{r}.json" for r in range(first, first + rendezvous.processes)}


def _last_words(file: Path) -> dict[str, Any] | None:
    """What a rank wrote at its end; None if it wrote nothing, or not to the end."""
    try:
        words: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return words


def last_commit(environment: Mapping[str, str]) -> LastWords | None:
    """Of this attempt, out of rank 0's progress record; None where another node has it.

    The record of an earlier attempt, which a run fetches with what it continues, tells nothing.
    """
    work = environment.get(naming.ENV_WORK_DIR)
    if work is None:
        return None
    try:
        progress = Progress.model_validate_json(
            (Path(work) / checkpoint_layout.PROGRESS).read_bytes()
        )
    except (OSError, ValidationError):
        return None
    attempt = environment.get(naming.ENV_ATTEMPT, "0")
    mine = (progress.run_id, str(progress.attempt)) == (environment.get(naming.ENV_RUN_ID), attempt)
    if not mine or progress.checkpoint_epoch is None:
        return None
    return LastWords(
        run_id=progress.run_id,
        attempt=progress.attempt,
        incarnation=progress.incarnation,
        checkpoint_epoch=progress.checkpoint_epoch,
        checkpoint_uri=progress.checkpoint_uri,
    )


def _say(line: str) -> None:
    """On stderr, or not at all: where that is a file on a full disk, the exit code has to do."""
    with contextlib.suppress(OSError):
        # Past Python's buffer: what stayed in it would fail again at exit, and change the code.
        os.write(sys.stderr.fileno(), line.encode())


def main(requests: Sequence[float]) -> int:
    """Returns the exit code; its message goes to stderr and to the termination message."""
    try:
        code, message = run(os.environ, requests)
    except TempFlowError as error:
        code, message = int(error.exit_code), str(error)
    if message:
        _say(f"{'note' if code == ExitCode.PREEMPTED else 'error'}: {message}\n")
    if TERMINATION_LOG.exists():
        TERMINATION_LOG.write_text(termination.compose(last_commit(os.environ), message))
    return int(code)
