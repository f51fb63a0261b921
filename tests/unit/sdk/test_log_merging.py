"""Where a log goes on after a lost connection, and how live logs are put in order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow import ClusterError, LogLine
from tempflow.cluster.logs import Held, Moment, PodLog, of_pods
from tempflow.cluster.watching import Patience
from tempflow_api import naming


def stamped(nanos: int, text: str) -> bytes:
    return f"2026-01-31T12:00:{nanos // 10**9:02}.{nanos % 10**9:09}Z {text}".encode()


def accepted(log: PodLog, lines: list[bytes]) -> list[str]:
    log.query(follow=True)  # a new request
    return [new[1].text for line in lines if (new := log.accept(line)) is not None]


@given(
    times=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=5),
)
def test_any_cut_loses_and_repeats_nothing(times: list[int], cuts: list[int]) -> None:
    """The server starts again at a whole second, and many lines may have the same time."""
    lines = [stamped(t * 500_000_000, f"line {i}") for i, t in enumerate(sorted(times))]
    log, got = PodLog("default", "x", 1, 0), list[str]()
    for cut in [*sorted(cuts), len(lines)]:
        since = log.query(follow=True).get("sinceTime")
        again = [line for line in lines[:cut] if since is None or line.decode() >= since[:-1]]
        got += accepted(log, again)
    assert got == [f"line {i}" for i in range(len(lines))]


def test_zones_and_short_fractions_are_the_same_time() -> None:
    log = PodLog("default", "x", 1, 0)
    first = log.accept(b"2026-01-31T13:00:00.5+01:00 a")
    second = log.accept(b"2026-01-31T12:00:00.500000001Z b")
    assert first is not None
    assert second is not None
    assert first[1].time == "2026-01-31T12:00:00.500000000Z"
    assert second[0] > first[0]


@pytest.mark.parametrize("line", [b"unable to retrieve container logs", b"", b"x y z"])
def test_what_a_kubelet_says_itself_is_an_error(line: bytes) -> None:
    with pytest.raises(ClusterError, match="log of pod x"):
        PodLog("default", "x", 1, 0).accept(line)


def test_an_empty_line_is_a_line() -> None:
    assert accepted(PodLog("default", "x", 1, 0), [stamped(0, "")]) == [""]


def line(text: str) -> LogLine:
    return LogLine("", 1, 0, text)


def test_a_line_that_comes_late_overtakes() -> None:
    held = Held(hold_seconds=1)
    held.put(Moment(2, 0), line("later"), now=0.0)
    assert list(held.due(0.5)) == []
    held.put(Moment(1, 0), line("earlier"), now=0.5)
    assert [one.text for one in held.due(1.0)] == ["earlier", "later"]
    assert list(held.rest()) == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=40))
def test_whatever_is_put_comes_out_once(puts: list[tuple[int, int]]) -> None:
    held, now, out = Held(hold_seconds=2), 0.0, list[str]()
    for i, (second, wait) in enumerate(puts):
        now += wait
        held.put(Moment(second, 0), line(str(i)), now)
        out += [one.text for one in held.due(now)]
    out += [one.text for one in held.rest()]
    assert sorted(out, key=int) == [str(i) for i in range(len(puts))]


def pod(uid: str, attempt: int, rank: int, state: str) -> dict[str, object]:
    return {
        "metadata": {
            "uid": uid,
            "name": uid,
            "namespace": "default",
            "labels": {naming.LABEL_ATTEMPT: str(attempt)},
            "annotations": {"batch.kubernetes.io/job-completion-index": str(rank)},
        },
        "status": {"containerStatuses": [{"name": "trainer", "state": {state: {}}}]},
    }


def test_only_started_pods_have_logs() -> None:
    pods = [pod("a", 1, 0, "running"), pod("b", 1, 1, "waiting"), pod("c", 2, 1, "terminated")]
    assert set(of_pods(pods)) == {"a", "c"}
    assert set(of_pods(pods, attempt=2)) == {"c"}
    assert set(of_pods(pods, ranks=frozenset({0}))) == {"a"}


class TestPatience:
    def test_an_error_that_stays_is_raised_at_once(self) -> None:
        with pytest.raises(ClusterError):
            Patience(None).endure(ClusterError("no", 403))

    def test_one_that_passes_is_borne_until_too_late_since_the_last_answer(self) -> None:
        now = [0.0]

        def sleep(seconds: float) -> None:
            now[0] += seconds

        patience, busy = Patience(10, lambda: now[0], sleep), ClusterError("busy", 503)
        for _ in range(3):
            patience.endure(busy)
        patience.answered()
        begun = now[0]
        for _ in range(4):
            patience.endure(busy)
        now[0] = begun + 10
        with pytest.raises(ClusterError, match="busy"):
            patience.endure(busy)
