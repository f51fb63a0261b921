"""The real trainer under its launcher, with its checkpoints in S3: killed, taken over, cut off."""

from typing import Any

import pytest

from tempflow.checkpoints import open_store, steps
from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ExitCode
from tests.faults.s3_proxy import Fault, Proxy
from tests.faults.trainer_run import Hold, Run, finish, kill_all, of_step, ranks_of

pytestmark = [pytest.mark.faults, pytest.mark.slow]


# Where each start is killed, and which checkpoints count then. The first entry that a start makes
# of the ledger is its claim.
KILLS: tuple[tuple[dict[str, Any], list[int]], ...] = (
    ({"key": of_step(2, "state/optimizer"), "lost": True}, [1]),
    ({"key": of_step(2, layout.MANIFEST), "lost": True}, [1]),
    ({"key": of_step(2, layout.MANIFEST), "applied": True}, [1]),
    ({"key": f"{layout.LEDGER}/", "skip": 1, "applied": True}, [1, 2]),
    ({"key": layout.LATEST, "lost": True}, [1, 2, 3]),
    ({"key": layout.METRICS, "lost": True}, [1, 2, 3]),
)


def test_kill_9_at_a_request_of_a_save(run: Run, s3: Proxy, undisturbed: dict[str, str]) -> None:
    for attempt, (request, counts) in enumerate(KILLS, start=1):
        hold = Hold(s3, "PutObject", **request)
        process = run.start(attempt=attempt)
        hold.wait(process)
        kill_all(process)
        hold.release()
        s3.clear()
        assert run.committed() == counts, request
    code, output = finish(run.start(attempt=len(KILLS) + 1))
    assert code == ExitCode.DONE, output
    assert run.result() == undisturbed


def test_a_start_that_was_taken_over_stops_itself(
    run: Run, s3: Proxy, undisturbed: dict[str, str]
) -> None:
    hold = Hold(s3, "PutObject", of_step(2, layout.MANIFEST))
    old = run.start()
    hold.wait(old)
    for rank in ranks_of(old):
        rank.suspend()
    code, output = finish(run.start(attempt=2))
    assert code == ExitCode.DONE, output
    hold.release()
    for rank in ranks_of(old):
        rank.resume()
    code, output = finish(old)
    assert code == ExitCode.FENCED, output
    assert "what this one writes no longer counts" in output
    store = open_store(run.stored, s3.endpoint, "us-east-1")
    assert [step.attempt for step in steps(store)] == [1, 2, 2, 2]
    assert run.result() == undisturbed
    assert "rank 0 ends with exit code 0: done" in run.last_lines(2, 0)[-1]


def test_a_store_that_is_lost_ends_the_run_with_a_code_of_its_own(run: Run, s3: Proxy) -> None:
    s3.add(Fault("PutObject", key=of_step(2, "") + "|" + of_step(3, ""), status=403))
    s3.add(Fault("PutObject", key=of_step(4, ""), status=403, code="AccessDenied"))
    code, output = finish(run.start())
    assert code == ExitCode.UNCOMMITTED, output
    assert "3 checkpoints in a row could not be stored" in output
    assert output.splitlines()[-1].startswith("error: ")
    assert run.committed() == [1]
