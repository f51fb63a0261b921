"""What can go wrong with `tempflow run`, done to real processes of the real trainer.

Every case ends with one error line, the documented exit code, no process left behind, and a run
that the same command continues to the very result of an undisturbed one.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from tempflow_api import checkpoint_layout as layout
from tempflow_api import naming
from tempflow_api.errors import ExitCode

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "tempflow", "run"]
EPOCHS = 6
PATIENCE_SECONDS = 300


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job of six short epochs with a checkpoint after each."""
    manifest = yaml.safe_load((ROOT / "examples/digits.yaml").read_text())
    manifest["metadata"]["name"] = "faulty"
    spec = manifest["spec"]
    spec["algorithm"] |= {"epochs": EPOCHS, "promptsPerEpoch": 4, "seedsPerPrompt": 1}
    spec["evaluation"] = {"everyEpochs": 100, "steps": 4, "prompts": 2, "imagesPerPrompt": 2}
    spec["checkpoint"] = {"everyEpochs": 1}
    spec["compute"] |= {"processesPerNode": 1}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(manifest))
    return path


def start(job: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, str(job), "--work-dir", str(job.parent / "runs"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=job.parent,
        env={**os.environ, **environment},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, output


def run(job: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    return finish(start(job, *arguments, **environment))


def folder(job: Path) -> Path:
    return job.parent / "runs" / "faulty"


def committed(root: Path) -> list[str]:
    return sorted(m.parent.name for m in (root / layout.CHECKPOINTS).glob(f"*/{layout.MANIFEST}"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds, while the process lives."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    below = psutil.Process(process.pid).children(recursive=True)
    return [p for p in below if "tempflow_trainer.main" in p.cmdline() and "-u" in p.cmdline()]


def processes_of(job: Path) -> list[int]:
    """Processes that still work for the job, by the environment that they were given."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(naming.ENV_WORK_DIR) == str(folder(job).resolve()):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def adapter_digest(root: Path) -> str:
    newest = root / layout.CHECKPOINTS / committed(root)[-1]
    (weights,) = (newest / layout.ADAPTER).glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the adapter that the job ends with when nothing happens."""
    job_path = job.__wrapped__(tmp_path_factory.mktemp("undisturbed"))  # type: ignore[attr-defined]
    code, output = run(job_path)
    assert code == 0, output
    return adapter_digest(folder(job_path))


def test_ctrl_c_commits_and_the_same_command_continues(job: Path, undisturbed: str) -> None:
    process = start(job)
    wait_for(lambda: len(committed(folder(job))) > 0, process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == ExitCode.INTERRUPTED, output
    assert "Traceback" not in output
    assert committed(folder(job)), "what was committed is there"
    assert not processes_of(job)
    code, output = run(job)
    assert code == 0, output
    assert adapter_digest(folder(job)) == undisturbed


def test_ctrl_c_while_it_starts(job: Path) -> None:
    process = start(job)
    wait_for(lambda: len(ranks_of(process)) > 0, process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == ExitCode.INTERRUPTED, output
    assert "memory" not in output
    assert not processes_of(job)


def test_a_killed_rank_is_one_error_and_the_run_continues(job: Path) -> None:
    process = start(job, "--set", "spec.compute.processesPerNode=2")
    wait_for(lambda: len(committed(folder(job))) > 0, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].kill()
    code, output = finish(process)
    assert code == ExitCode.RANK_DIED, output
    assert "died without a word" in output
    assert "Traceback" not in output
    assert not processes_of(job)
    # Compute may change between two starts, and the result does not, but for rounding.
    code, output = run(job)
    assert code == 0, output
    assert len(committed(folder(job))) > 0


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_the_own_error_of_one_rank_is_the_cause(job: Path, strategy: str) -> None:
    """The other waits for it, in a sum or in a forward, and loses it within seconds."""
    manifest = yaml.safe_load(job.read_text())
    spec = manifest["spec"]
    # The second process draws the second prompt, whose word the model does not know.
    spec["data"] = {"prompts": ["a one", "a dragon"], "shuffle": False}
    spec["evaluation"] |= {"imagesPerPrompt": 1}
    spec["compute"] |= {"processesPerNode": 2, "strategy": strategy}
    job.write_text(yaml.safe_dump(manifest))
    process = start(job)
    code, output = finish(process)
    failed = (folder(job) / "ranks" / "rank-1.json").stat().st_mtime
    assert time.time() - failed < 20
    assert code == ExitCode.INVALID, output
    assert "unknown word 'dragon'" in output
    assert "lost a peer" not in output.splitlines()[-1]
    assert not processes_of(job)


def test_kill_9_of_everything_leaves_only_whole_checkpoints(job: Path, undisturbed: str) -> None:
    process = start(job)
    wait_for(lambda: len(committed(folder(job))) > 1, process)
    command = psutil.Process(process.pid)
    for victim in [*command.children(recursive=True), command]:
        victim.kill()
    finish(process)
    code, output = run(job)
    assert code == 0, output
    assert "continuing after epoch" in output
    assert adapter_digest(folder(job)) == undisturbed


def test_a_full_disk_keeps_what_was_complete(job: Path, tmp_path: Path) -> None:
    store = tmp_path / "small"
    store.mkdir()
    command = [*CLI, str(job), "--work-dir", str(tmp_path / "runs"), "--plain"]
    command += ["--set", f"spec.checkpoint.uri={store}"]
    # A disk of its own, seen by this process and its children only. What it held is copied out
    # before it disappears with them.
    script = (
        f"mount -t tmpfs -o size=500k tmpfs {store} && {{ {' '.join(command)}; code=$?; "
        f"cp -r {store} {tmp_path}/seen; exit $code; }}"
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == ExitCode.UNCOMMITTED, done.stdout + done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    seen = tmp_path / "seen" / "faulty"
    assert committed(seen), "the checkpoints from before"
    incomplete = {f.name for f in (seen / layout.CHECKPOINTS).iterdir()} - set(committed(seen))
    assert not incomplete, "nothing half-written"


def test_a_disk_with_everything_on_it_fills(job: Path, tmp_path: Path) -> None:
    """Record, log and last words too: what is said then has only the exit code to go by."""
    work = tmp_path / "runs"
    work.mkdir()
    command = " ".join([*CLI, str(job), "--work-dir", str(work), "--plain"])
    first = f"{folder(job)}/{layout.CHECKPOINTS}/*/{layout.MANIFEST}"
    script = f"""
        mount -t tmpfs -o size=16m tmpfs {work} || exit
        {command} & trainer=$!
        while ! ls {first} >/dev/null 2>&1; do sleep 0.05; done
        while kill -0 $trainer 2>/dev/null; do
            cat /dev/zero >>{work}/filler 2>/dev/null
            sleep 0.05
        done
        wait $trainer; code=$?
        rm {work}/filler
        cp -r {work} {tmp_path}/seen
        exit $code
    """
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == ExitCode.STORE, said
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "full" in error
    assert "Traceback" not in said
    assert committed(tmp_path / "seen" / "faulty"), "the checkpoints from before"


def test_a_folder_that_cannot_be_written(job: Path) -> None:
    (job.parent / "runs").write_text("a file where a folder is wanted")
    code, output = run(job)
    assert code == ExitCode.STORE
    assert output.count("error:") == 1
    assert "cannot write" in output


def test_a_port_in_use(job: Path) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, output = run(job, **{naming.ENV_MASTER_PORT: port})
        assert code == ExitCode.ADDRESS_IN_USE
        assert f"port {port}" in output
        code, output = run(job, **{naming.ENV_PROGRESS_PORT: port})
        assert code == ExitCode.ADDRESS_IN_USE
        assert f"port {port}" in output
    assert not processes_of(job)


def test_another_configuration_does_not_continue_a_run(job: Path) -> None:
    code, output = run(job, "--set", "spec.algorithm.epochs=1")
    assert code == 0, output
    code, output = run(job, "--set", "spec.algorithm.epochs=2", "--set", "spec.algorithm.seed=9")
    assert code == ExitCode.CONFIG_CHANGED
    assert "spec.algorithm.seed" in output
    code, output = run(job, "--set", "spec.algorithm.epochs=2")
    assert code == 0, output


def test_a_gpu_that_is_not_there(job: Path) -> None:
    code, output = run(job, "--set", "spec.compute.device=cuda", CUDA_VISIBLE_DEVICES="")
    assert code == ExitCode.DEVICE
    assert "0 GPUs found" in output
