"""When a server is asked, which one, and how long the next attempt waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow_trainer.rewards import transport
from tempflow_trainer.rewards.transport import (
    FAILURES_TO_OPEN,
    Breaker,
    Endpoint,
    Transport,
    back_off,
    choose,
)


def broken(failures: int, now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(failures):
        breaker.started()
        breaker.failed(now)
    return breaker


def test_a_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = broken(FAILURES_TO_OPEN - 1)
    assert breaker.admits(0.0)
    breaker.succeeded()
    breaker.failed(0.0)
    assert breaker.admits(0.0)
    assert not broken(FAILURES_TO_OPEN).admits(0.0)


def test_an_open_breaker_lets_one_request_try_and_believes_its_outcome() -> None:
    breaker = broken(FAILURES_TO_OPEN)
    later = breaker.opened_until
    assert not breaker.admits(later - 0.01)
    assert breaker.admits(later)
    breaker.started()
    assert not breaker.admits(later), "a second one waits for the first"
    breaker.failed(later)
    assert breaker.opened_until - later > later, "the next pause is longer"
    breaker.started()
    breaker.succeeded()
    assert breaker.admits(0.0)
    assert breaker.admits(0.0)


@given(st.integers(FAILURES_TO_OPEN, 10_000))
def test_a_breaker_never_stays_open_for_longer_than_the_longest_pause(failures: int) -> None:
    breaker = broken(FAILURES_TO_OPEN)
    breaker.failures = failures
    breaker.failed(5.0)
    assert breaker.admits(5.0 + transport.LONGEST_BACK_OFF_SECONDS)


@pytest.mark.parametrize("failures", [FAILURES_TO_OPEN, 10, 10_000])
def test_a_server_that_is_starting_is_asked_often(failures: int) -> None:
    waiting = Transport([Endpoint("http://a")], 60.0, 600.0).patient(600.0)
    [endpoint] = waiting.endpoints
    endpoint.breaker.failures = failures
    endpoint.breaker.failed(5.0)
    assert endpoint.breaker.admits(5.0 + transport.STARTING_BACK_OFF_SECONDS)
    longest = waiting.longest_back_off_seconds
    assert back_off(failures, None, lambda: 0.99, longest) <= transport.STARTING_BACK_OFF_SECONDS
    assert transport.STARTING_BACK_OFF_SECONDS < transport.LONGEST_BACK_OFF_SECONDS


@given(
    st.integers(0, 10_000),
    st.none() | st.floats(0, 1e6),
    st.floats(0, 1, exclude_max=True),
)
def test_pauses_are_capped_and_keep_what_the_server_asks_for(
    attempt: int, retry_after: float | None, share: float
) -> None:
    pause = back_off(attempt, retry_after, lambda: share)
    assert 0 <= pause <= transport.LONGEST_BACK_OFF_SECONDS
    if retry_after is not None:
        assert pause >= min(retry_after, transport.LONGEST_BACK_OFF_SECONDS)


def test_pauses_double_and_are_spread() -> None:
    assert [back_off(n, None, lambda: 1.0) for n in range(3)] == [0.2, 0.4, 0.8]
    assert (back_off(2, None, lambda: 0.0), back_off(2, None, lambda: 0.5)) == (0.0, 0.4)


@pytest.mark.parametrize(
    ("endpoints", "chosen"),
    [
        ([Endpoint("a", in_flight=1), Endpoint("b")], "b"),
        ([Endpoint("a", served=3), Endpoint("b", served=2)], "b"),
        ([Endpoint("a", broken(1)), Endpoint("b", served=9)], "b"),
        ([Endpoint("a", broken(1)), Endpoint("b", in_flight=2)], "a"),
        ([Endpoint("a", broken(3)), Endpoint("b", in_flight=9)], "b"),
        ([Endpoint("a", broken(3)), Endpoint("b", broken(4))], None),
    ],
    ids=["idle", "in turn", "sound", "sound but busy", "closed", "none"],
)
def test_the_least_busy_sound_endpoint_is_asked(
    endpoints: list[Endpoint], chosen: str | None
) -> None:
    found = choose(endpoints, now=0.0)
    assert (found.url if found else None) == chosen


def test_an_attempt_tells_the_breaker_how_it_ended() -> None:
    endpoint = Endpoint("a")
    for error in (transport.Unavailable("busy"), TimeoutError(), OSError()):
        with pytest.raises(type(error)), endpoint.trying():
            raise error
    assert (endpoint.in_flight, endpoint.breaker.failures, endpoint.served) == (0, 3, 0)
    with endpoint.trying():
        assert endpoint.in_flight == 1
    assert (endpoint.breaker.failures, endpoint.served) == (0, 1)
    with pytest.raises(transport.ServiceFailed), endpoint.trying():
        raise transport.ServiceFailed("a wrong answer is no outage")
    assert endpoint.breaker.failures == 0
