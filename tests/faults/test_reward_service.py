"""What can go wrong between trainer and reward service: real server, real client, faulty proxy.

The table of docs/rewards-service.md, row by row. A fault that passes changes no score; one that
stays ends in one error that names address and reason; a wrong answer is never asked for twice.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch

from tempflow_api.errors import ExitCode, RewardFailed
from tempflow_api.v1alpha1 import RewardService, RewardTerm
from tempflow_trainer import loop
from tempflow_trainer.rewards import registry, wire
from tempflow_trainer.rewards.base import Reward
from tests.faults.reward_proxy import FaultProxy, proxied
from tests.numerics.toys import run_of, spec_of
from tests.unit.trainer.reward_servers import reds
from tests.unit.trainer.test_reward_service import parts_of

pytestmark = pytest.mark.faults

TIMEOUT, DEADLINE = 0.6, 2.0
REWARD = "digit-contrast"


def start(*arguments: str, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    """A real server process, and its address once it listens."""
    command = [sys.executable, "-m", "tempflow_trainer.rewards.serve", REWARD]
    process = subprocess.Popen(
        [*command, "--port", str(port), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    said = ""
    while not (found := re.search(r"serves \S+ at (http\S+)", said)):
        line = process.stderr.readline()
        assert line, f"the server ended: {said}"
        said += line
    threading.Thread(target=process.stderr.read, daemon=True).start()
    return process, found.group(1)


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(20)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    process, url = start()
    yield url
    assert stop(process) == 0


@pytest.fixture(scope="module")
def proxy(server: str) -> Iterator[tuple[str, FaultProxy]]:
    with proxied(server) as found:
        yield found


def remote(
    url: str, *, required: bool = True, deadline: float = DEADLINE, timeout: float = TIMEOUT
) -> Reward:
    """A client that was told what is served, before any fault."""
    service = RewardService(
        endpoints=[url], timeout_seconds=min(timeout, deadline), deadline_seconds=deadline
    )
    reward = registry.build([RewardTerm(name=REWARD, service=service)])
    return Reward([replace(reward.terms[0], required=required)])


def score(reward: Reward) -> torch.Tensor:
    [scores] = reward.score(reds(10, 100, 200), ["a", "b", "c"], [{}] * 3).values()
    return scores


def in_process() -> torch.Tensor:
    return score(registry.build([RewardTerm(name=REWARD)]))


@pytest.mark.parametrize("fault", ["slow", "hang", "reset", "500", "429", "503", "truncated"])
def test_a_fault_that_passes_changes_no_score(proxy: tuple[str, FaultProxy], fault: str) -> None:
    url, faults = proxy
    reward = remote(url, deadline=20.0)
    faults.set(fault, times=2)
    assert torch.equal(score(reward), in_process())
    assert faults.requests == (1 if fault == "slow" else 3)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", "no answer within 0.6 s"),
        ("reset", "Server disconnected"),
        ("500", "status 500: .*a bad day"),
        ("503", "status 503: .*a bad day"),
        ("429", "status 429: .*a bad day"),
        ("truncated", "payload is not completed"),
    ],
)
def test_a_fault_that_stays_ends_by_the_deadline_and_is_named(
    proxy: tuple[str, FaultProxy], fault: str, reason: str
) -> None:
    url, faults = proxy
    # What answers is given time to, on a machine that does other things.
    reward = remote(url, timeout=TIMEOUT if fault == "hang" else DEADLINE)
    faults.set(fault, times=1_000_000)
    start_time = time.monotonic()
    with pytest.raises(RewardFailed, match=f"reward {REWARD}: no answer within 2 s") as caught:
        score(reward)
    assert time.monotonic() - start_time < DEADLINE + 1
    assert re.search(f"the last: {url}: .*{reason}", str(caught.value)), caught.value
    assert faults.requests < 12, "no server is asked without end"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("too few", "gives 2 scores for 3 images"),
        ("too many", "gives 4 scores for 3 images"),
        ("wrong order", "answers out of order: score 0 has id"),
        ("nan", "gives a score of NaN; a score must be finite"),
        ("infinite", "gives a score of Infinity"),
        ("400", "refuses with status 400"),
        ("401", "refuses with status 401"),
        ("413", "refuses with status 413"),
        ("422", "refuses with status 422"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(
    proxy: tuple[str, FaultProxy], fault: str, reason: str
) -> None:
    url, faults = proxy
    reward = remote(url)
    faults.set(fault, times=1_000_000)
    with pytest.raises(RewardFailed, match=f"reward {REWARD}: .*{url}.*{reason}"):
        score(reward)
    assert faults.requests == 1


@pytest.mark.parametrize("fault", ["hang", "500", "nan", "too few"])
def test_an_optional_reward_that_fails_is_missing_and_never_zero(
    proxy: tuple[str, FaultProxy], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    url, faults = proxy
    reward = remote(url, required=False, deadline=0.8)
    faults.set(fault, times=1_000_000)
    assert score(reward).isnan().all()
    assert f"reward {REWARD}: no score for 3 images" in caplog.text


def test_a_server_that_is_not_there_yet_is_waited_for(server: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with proxied(server, port) as (url, _):
        reward = remote(url, deadline=20.0)
    found: list[torch.Tensor] = []
    waiting = threading.Thread(target=lambda: found.append(score(reward)))
    waiting.start()
    time.sleep(1.0)
    assert not found, "nobody listens"
    with proxied(server, port):
        waiting.join(15)
    assert torch.equal(found[0], in_process())


@pytest.mark.parametrize("killed", [False, True], ids=["never there", "killed"])
def test_a_server_that_stays_away_ends_by_the_deadline_and_is_named(killed: bool) -> None:
    process, url = start()
    reward = remote(url)
    if killed:
        assert torch.equal(score(reward), in_process())
    process.kill()
    process.wait(10)
    start_time = time.monotonic()
    with pytest.raises(RewardFailed, match=f"reward {REWARD}: no answer within 2 s") as caught:
        score(reward)
    assert time.monotonic() - start_time < DEADLINE + 1
    assert re.search(f"the last: {url}: Cannot connect to host", str(caught.value)), caught.value


def learned(reward: Reward, epochs: int) -> torch.Tensor:
    run = replace(run_of(spec_of()), reward=reward)
    for epoch in range(epochs):
        loop.run_epoch(run, epoch)
    return torch.cat([p.detach().flatten() for p in run.tuning.parameters().values()])


def test_a_restart_of_the_server_in_the_middle_of_a_run_changes_nothing() -> None:
    process, url = start()
    port = int(url.rpartition(":")[2])
    undisturbed = learned(remote(url, deadline=60.0), 4)
    killed = threading.Event()

    class Killing(Reward):
        """Kills the server before the third scoring, and has it started anew."""

        count = 0

        def score(self, *arguments: object, **named: object) -> dict[str, torch.Tensor]:
            Killing.count += 1
            if Killing.count == 3:
                process.kill()
                process.wait(10)
                threading.Thread(target=again).start()
            return super().score(*arguments, **named)  # type: ignore[arg-type]

    restarted: list[subprocess.Popen[str]] = []

    def again() -> None:
        restarted.append(start(port=port)[0])
        killed.set()

    try:
        disturbed = learned(Killing(remote(url, deadline=60.0).terms), 4)
        assert killed.wait(20)
        assert torch.equal(disturbed, undisturbed)
    finally:
        for one in [process, *restarted]:
            one.kill()
            one.wait(10)


def test_a_server_that_is_asked_to_stop_finishes_what_it_accepted(tmp_path: Path) -> None:
    (tmp_path / "slow_reward.py").write_text(
        "import time\n"
        "class Slow:\n"
        "    batch_size = 8\n"
        "    def score(self, images, prompts, metadata):\n"
        "        time.sleep(1.5)\n"
        "        return images.mean(dim=(1, 2, 3))\n"
    )
    code = "import sys; from tempflow_trainer.rewards.serve import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "slow_reward:Slow", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        },
    )
    assert process.stderr is not None
    url = ""
    while not url:
        found = re.search(r"serves \S+ at (http\S+)", process.stderr.readline())
        url = found.group(1) if found else ""
    replies: list[requests.Response] = []

    def ask() -> None:
        replies.append(requests.post(url + wire.SCORE_PATH, files=parts_of(2), timeout=20))

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    late = requests.post(url + wire.SCORE_PATH, files=parts_of(1), timeout=20)
    assert (late.status_code, late.headers["Retry-After"]) == (503, "1")
    asking.join(20)
    assert replies[0].status_code == 200
    assert len(replies[0].json()["scores"]) == 2
    assert process.wait(20) == ExitCode.DONE


def test_a_port_that_is_taken_is_named(server: str) -> None:
    port = server.rpartition(":")[2]
    command = [sys.executable, "-m", "tempflow_trainer.rewards.serve", REWARD, "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == ExitCode.ADDRESS_IN_USE
    expected = f"error: cannot listen at 127.0.0.1:{port}: Address already in use"
    assert done.stderr.splitlines() == [expected]
