"""How a run ends, by what its ranks left behind, and where they meet."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tempflow_api import naming
from tempflow_api.errors import NOT_IN_TIME, AddressInUse, ExitCode, ManifestInvalid
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import TempFlowGRPOJob
from tempflow_trainer import gang
from tempflow_trainer.gang import Rendezvous, how_it_ended, last_commit, read_job, stopped
from tempflow_trainer.progress import ProgressServer
from tests.numerics.toys import spec_of

Told = dict[int, tuple[ExitCode, str]]
LOST = (ExitCode.RANK_DIED, "lost a peer: gloo")
DONE = (ExitCode.DONE, "")
KILLED = (
    "rank {} died without a word: it was killed, perhaps for want of memory; the run continues "
    "from its last checkpoint when it is started again"
)


def ended(folder: Path, status: int, told: Told, *, node_rank: int = 0) -> tuple[int, str]:
    for rank, (code, message) in told.items():
        record = {"rank": rank, "code": int(code), "message": message}
        (folder / f"rank-{rank}.json").write_text(json.dumps(record))
    return how_it_ended(status, folder, Rendezvous(2, node_rank, 2, "host", 1))


@pytest.mark.parametrize(
    ("status", "told", "expected"),
    [
        (0, {0: DONE, 1: DONE}, DONE),
        (1, {0: (ExitCode.STORE, "full"), 1: LOST}, (ExitCode.STORE, "full")),
        (1, {0: LOST, 1: (ExitCode.REWARD, "nan")}, (ExitCode.REWARD, "nan")),
        (1, {0: DONE, 1: (ExitCode.BUG, "oops")}, (ExitCode.BUG, "oops")),
        (
            1,
            {0: (ExitCode.PREEMPTED, "kept"), 1: (ExitCode.PREEMPTED, "kept")},
            (ExitCode.PREEMPTED, "kept"),
        ),
        (1, {0: LOST}, (ExitCode.RANK_DIED, KILLED.format(1))),
        (1, {1: LOST}, (ExitCode.RANK_DIED, KILLED.format(0))),
        (1, {}, (ExitCode.RANK_DIED, KILLED.format(0))),
        (1, {0: LOST, 1: LOST}, LOST),
        (
            3,
            {0: DONE, 1: DONE},
            (ExitCode.BUG, "the launcher of the ranks ended with status 3"),
        ),
    ],
    ids=[
        "all done",
        "own error first",
        "own error of a later rank",
        "one done, one not",
        "all asked to stop",
        "killed beside a loss",
        "first rank killed",
        "all killed",
        "peers of another node lost",
        "torchrun itself",
    ],
)
def test_how_it_ended(
    tmp_path: Path, status: int, told: Told, expected: tuple[ExitCode, str]
) -> None:
    assert ended(tmp_path, status, told) == expected


@pytest.mark.parametrize(
    ("seconds", "began", "code", "words"),
    [
        (5.0, True, NOT_IN_TIME, "killed before it could stop, 5 s after it was asked"),
        (5.0, False, ExitCode.PREEMPTED, "stopped while it was starting: nothing had been done"),
        (4.9, False, ExitCode.PREEMPTED, "stopped while it was starting: nothing had been done"),
        (4.9, True, ExitCode.RANK_DIED, KILLED.format(0)),
    ],
    ids=["in vain", "one had not begun, the other waited", "as it started", "for another reason"],
)
def test_a_rank_that_died_when_asked_to_stop(
    seconds: float, began: bool, code: int, words: str
) -> None:
    found, said = stopped(KILLED.format(0), seconds, 5, began=began)
    assert found == code
    assert said.startswith(words)


def test_only_the_ranks_of_this_node_are_read(tmp_path: Path) -> None:
    told: Told = {0: (ExitCode.STORE, "of the other node"), 2: (ExitCode.REWARD, "nan"), 3: LOST}
    assert ended(tmp_path, 1, told, node_rank=1) == (ExitCode.REWARD, "nan")


@pytest.mark.parametrize("content", ["", '{"rank": 0, "co'], ids=["empty", "cut"])
def test_words_that_are_cut_off_tell_of_a_full_disk(tmp_path: Path, content: str) -> None:
    (tmp_path / "rank-0.json").write_text(content)
    code, message = ended(tmp_path, 1, {1: LOST})
    assert code == ExitCode.STORE
    assert message.startswith(f"cannot write in {tmp_path.parent}: is the disk full?")


def test_another_rank_knows_more_than_words_that_are_cut_off(tmp_path: Path) -> None:
    (tmp_path / "rank-0.json").write_text("")
    assert ended(tmp_path, 1, {1: (ExitCode.REWARD, "nan")}) == (ExitCode.REWARD, "nan")


def job(**compute: object) -> TempFlowGRPOJob:
    changes = {f"compute.{name}": value for name, value in compute.items()}
    return TempFlowGRPOJob.model_validate(
        {
            "apiVersion": naming.API_VERSION,
            "kind": naming.KIND,
            "metadata": {"name": "demo"},
            "spec": spec_of(changes),
        }
    )


def test_one_machine_needs_no_address() -> None:
    found = Rendezvous.of(job(processesPerNode=2), {})
    assert (found.nodes, found.node_rank, found.processes) == (1, 0, 2)
    assert found.address == "127.0.0.1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", found.port))


def test_several_nodes_meet_where_the_operator_says() -> None:
    environment = {
        naming.ENV_MASTER_ADDR: "demo-a1-0.demo-a1.ml.svc",
        naming.ENV_MASTER_PORT: "29500",
        naming.ENV_NODE_RANK: "1",
    }
    found = Rendezvous.of(job(nodes=2, processesPerNode=4), environment)
    assert found == Rendezvous(2, 1, 4, "demo-a1-0.demo-a1.ml.svc", 29500)
    command = found.command()
    for part in (
        "--nnodes=2",
        "--node-rank=1",
        "--nproc-per-node=4",
        "--master-addr=demo-a1-0.demo-a1.ml.svc",
        "--master-port=29500",
        "--max-restarts=0",
    ):
        assert part in command


def test_several_nodes_without_an_address_are_refused() -> None:
    with pytest.raises(ManifestInvalid, match=r"spec\.compute\.nodes: got 2, expected 1"):
        Rendezvous.of(job(nodes=2), {})


def test_a_taken_port_is_named_with_the_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {naming.ENV_MASTER_PORT: str(port)}
        with pytest.raises(AddressInUse, match=rf"port {port}, .* set TEMPFLOW_MASTER_PORT"):
            Rendezvous.of(job(), environment)
        # Another node only connects to it.
        other = {**environment, naming.ENV_MASTER_ADDR: "host", naming.ENV_NODE_RANK: "1"}
        assert Rendezvous.of(job(nodes=2), other).port == port


def test_a_taken_port_of_the_progress_record_is_named_with_the_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=rf"port {port} .* set TEMPFLOW_PROGRESS_PORT"):
            ProgressServer(port)


def test_a_job_file_that_is_no_job_names_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    with pytest.raises(ManifestInvalid, match=r"job\.json: the file: No such file"):
        read_job(path)
    path.write_text(job().model_dump_json(by_alias=True).replace('"steps":5', '"steps":"five"'))
    with pytest.raises(ManifestInvalid, match=r"spec\.sampling\.steps: Input should be"):
        read_job(path)


def test_the_progress_record_is_served_whole_and_nothing_else() -> None:
    import urllib.error
    import urllib.request

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    server = ProgressServer(port)

    def answer(path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    assert answer(naming.PROGRESS_PATH)[0] == 404
    told = Progress(epoch=3, epochs=9, phase="update", time="2026-11-24T12:00:00Z")
    server.announce(told)
    status, body = answer(naming.PROGRESS_PATH)
    assert status == 200
    assert Progress.model_validate_json(body) == told
    assert answer("/")[0] == 404


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, 3),
        ({"runId": "team/other"}, None),
        ({"attempt": 1}, None),
        ({"checkpointEpoch": None}, None),
        ({"epoch": "x"}, None),
    ],
)
def test_only_a_commit_of_this_very_attempt_is_told(
    tmp_path: Path, changes: dict[str, object], told: int | None
) -> None:
    record = {
        "epoch": 4,
        "epochs": 9,
        "phase": "rollout",
        "attempt": 2,
        "runId": "team/demo",
        "checkpointEpoch": 3,
        "checkpointUri": "s3://b/3",
        "time": "2026-01-31T12:00:00Z",
        **changes,
    }
    (tmp_path / "record").mkdir()
    (tmp_path / "record/progress.json").write_text(json.dumps(record))
    environment = {
        naming.ENV_WORK_DIR: str(tmp_path),
        naming.ENV_ATTEMPT: "2",
        naming.ENV_RUN_ID: "team/demo",
    }
    words = last_commit(environment)
    assert (words.checkpoint_epoch if words else None) == told
    assert last_commit({**environment, naming.ENV_WORK_DIR: str(tmp_path / "none")}) is None


def test_a_torchrun_that_hangs_after_its_ranks_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gang, "LINGER_SECONDS", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", deaf])
    assert gang._wait(child, [0.0], lambda: True) < 0


def test_without_a_request_to_stop_other_nodes_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gang, "LINGER_SECONDS", 0.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    assert gang._wait(child, [], lambda: True) == 0
