"""The work queue, under a clock that the tests turn."""

import asyncio
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow_operator.decisions.observed import Key
from tempflow_operator.settings import Queue
from tempflow_operator.workqueue import Schedule, Workers
from tests.unit.operator.virtual_time import now, run

A, B = Key("team", "a"), Key("team", "b")
SETTINGS = Queue(gap=0, retry_delay=1, retry_delay_limit=60)


def schedule(settings: Queue = SETTINGS) -> Schedule:
    return Schedule(settings, Random(7))


class TestSchedule:
    def test_a_key_is_given_out_once(self) -> None:
        queue = schedule()
        for _ in range(5):
            queue.add(A, 0)
        assert queue.take(0) == A
        assert queue.take(0) is None

    def test_a_key_in_work_waits_for_its_return(self) -> None:
        queue = schedule()
        queue.add(A, 0)
        queue.take(0)
        queue.add(A, 1)
        assert queue.take(100) is None
        queue.done(A, 2, again_in=None)
        assert queue.take(2) == A

    def test_the_earlier_time_wins(self) -> None:
        queue = schedule()
        queue.add(A, 0, delay=10)
        queue.add(A, 0, delay=2)
        queue.add(A, 0, delay=20)
        assert queue.next_due() == 2
        assert queue.take(1.9) is None
        assert queue.take(2) == A
        queue.done(A, 3, again_in=None)
        assert queue.take(1000) is None

    def test_first_come_first_served(self) -> None:
        queue = schedule()
        queue.add(B, 0)
        queue.add(A, 1)
        assert (queue.take(2), queue.take(2)) == (B, A)

    def test_what_is_urgent_goes_first_whenever_it_came(self) -> None:
        queue = schedule()
        queue.add(A, 0)
        queue.add(B, 1)
        queue.add(B, 2, urgent=True)
        assert queue.take(2) == B
        queue.add(B, 3)  # in work, and only as urgent as before
        queue.done(B, 3, again_in=None)
        assert (queue.take(3), queue.take(3), queue.take(3)) == (A, B, None)

    def test_what_is_urgent_and_not_due_holds_nothing_up(self) -> None:
        queue = schedule()
        queue.add(A, 0, delay=10, urgent=True)
        queue.add(B, 0, delay=5)
        assert queue.next_due() == 5
        assert queue.take(5) == B
        assert (queue.take(9.9), queue.take(10)) == (None, A)

    def test_a_pass_asks_for_another(self) -> None:
        queue = schedule()
        queue.add(A, 0)
        queue.take(0)
        queue.done(A, 5, again_in=30)
        assert queue.take(34) is None
        assert queue.take(35) == A

    def test_an_event_comes_before_what_the_pass_asked_for(self) -> None:
        queue = schedule()
        queue.add(A, 0)
        queue.take(0)
        queue.add(A, 1)
        queue.done(A, 5, again_in=30)
        assert queue.take(5) == A

    def test_passes_of_one_key_keep_their_distance(self) -> None:
        queue = schedule(Queue(gap=0.5))
        queue.add(A, 0)
        queue.take(0)
        queue.add(A, 0.1)
        queue.done(A, 0.2, again_in=None)
        assert queue.take(0.6) is None
        assert queue.take(0.7) == A

    def test_errors_back_off_and_are_forgotten(self) -> None:
        queue, now, delays = schedule(), 0.0, []
        queue.add(A, now)
        for _ in range(10):
            assert queue.take(now) == A
            delays.append(queue.failed(A, now))
            now += delays[-1]
        for number, delay in enumerate(delays):
            steady = min(2**number, 60)
            assert 0.8 * steady <= delay <= 1.2 * steady
        queue.take(now)
        queue.done(A, now, again_in=0)
        queue.take(now)
        assert queue.failed(A, now) <= 1.2

    def test_an_event_does_not_cut_the_back_off_short(self) -> None:
        queue = schedule()
        queue.add(A, 0)
        queue.take(0)
        delay = queue.failed(A, 0)
        queue.add(A, 0.1)
        assert queue.take(delay - 0.01) is None
        assert queue.take(delay) == A

    def test_what_is_urgent_stays_so_when_the_pass_under_way_fails(self) -> None:
        queue = schedule()
        queue.add(A, 0)
        queue.take(0)
        queue.add(A, 0.1, urgent=True)
        queue.failed(A, 0.2)
        queue.add(B, 0.3)
        assert (queue.take(10), queue.take(10)) == (A, B)

    def test_an_urgent_pass_that_fails_is_urgent_again(self) -> None:
        queue = schedule()
        queue.add(B, 0, urgent=True)
        queue.take(0)
        queue.failed(B, 0)
        queue.add(A, 0.3)
        assert (queue.take(10), queue.take(10)) == (B, A)

    def test_one_keys_errors_do_not_slow_another(self) -> None:
        queue = schedule()
        queue.add(A, 0)
        queue.take(0)
        queue.failed(A, 0)
        queue.add(B, 0)
        assert queue.take(0) == B

    def test_depth_and_wait(self) -> None:
        queue = schedule()
        assert (queue.depth(0), queue.longest_wait(0)) == (0, 0)
        queue.add(A, 0)
        queue.add(B, 0, delay=100)
        assert (queue.depth(10), queue.longest_wait(10)) == (1, 10)
        queue.take(10)
        assert (queue.depth(15), queue.longest_wait(15)) == (1, 5)
        queue.done(A, 20, again_in=None)
        assert (queue.depth(20), queue.longest_wait(20)) == (0, 0)

    def test_nothing_is_kept_of_a_key_that_is_done(self) -> None:
        queue = schedule()
        for number in range(100):
            key = Key("team", str(number))
            queue.add(key, 0)
            queue.take(0)
            queue.done(key, 0, again_in=None)
        assert queue._entries == {}
        assert queue._heaps == {True: [], False: []}

    @given(st.lists(st.tuples(st.sampled_from("autdf"), st.integers(0, 3), st.floats(0, 9))))
    def test_no_history_loses_a_key_or_gives_it_to_two(
        self, steps: list[tuple[str, int, float]]
    ) -> None:
        queue, now = schedule(), 0.0
        working: set[Key] = set()
        wanted: set[Key] = set()
        for step, number, seconds in steps:
            now += seconds
            key = Key("team", str(number))
            if step in "au":
                queue.add(key, now, urgent=step == "u")
                wanted.add(key)
            elif step == "t":
                taken = queue.take(now)
                assert taken not in working
                if taken is not None:
                    working.add(taken)
                    wanted.discard(taken)
            elif key in working:
                working.remove(key)
                if step == "d":
                    queue.done(key, now, again_in=None)
                else:
                    queue.failed(key, now)
                    wanted.add(key)
        for key in working:
            queue.done(key, now, again_in=None)
        later = now + 1000
        assert {queue.take(later) for _ in wanted} == wanted
        assert queue.take(later) is None


class Passes:
    """A handler that records, with the workers that call it."""

    def __init__(self, settings: Queue) -> None:
        self.seen: list[Key] = []
        self.errors: list[str] = []
        self.at_once = self.most_at_once = 0
        self.fail_first = 0
        self.workers = Workers(
            settings,
            self.handle,
            clock=now,
            on_error=lambda key, error, _: self.errors.append(f"{key}: {error}"),
        )

    async def handle(self, key: Key) -> float | None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        self.seen.append(key)
        if len(self.seen) <= self.fail_first:
            raise RuntimeError("no")
        return None

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.seen) < count:
                await asyncio.sleep(0.005)


def work(passes: Passes, keys: list[Key], count: int, delay: float = 0) -> None:
    async def story() -> None:
        running = asyncio.create_task(passes.workers.run())
        for key in keys:
            passes.workers.add(key, delay=delay)
        await passes.until(count)
        await asyncio.sleep(0.03)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    run(story)


class TestWorkers:
    def test_a_burst_of_events_is_one_pass(self) -> None:
        passes = Passes(Queue())
        work(passes, [A] * 50, 1, delay=0.02)
        assert passes.seen == [A]

    def test_different_keys_run_together(self) -> None:
        passes = Passes(Queue(workers=4))
        work(passes, [Key("team", str(number)) for number in range(8)], 8)
        assert passes.most_at_once == 4

    def test_an_error_is_told_and_retried(self) -> None:
        passes = Passes(Queue(gap=0, retry_delay=0.01))
        passes.fail_first = 2
        work(passes, [A], 3)
        assert passes.seen == [A, A, A]
        assert passes.errors == ["team/a: no", "team/a: no"]

    def test_a_pass_in_an_hour_is_made_in_an_hour(self) -> None:
        async def story() -> None:
            times: list[float] = []

            async def handle(_: Key) -> float | None:
                times.append(now())
                return 3000 if len(times) == 1 else None

            workers = Workers(Queue(), handle, clock=now, on_error=lambda *_: None)
            running = asyncio.create_task(workers.run())
            workers.add(A)
            await asyncio.sleep(3100)
            running.cancel()
            assert times == [0, 3000]

        run(story)
