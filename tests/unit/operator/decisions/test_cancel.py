"""A job that is cancelled: stopped, ended, and never begun again."""

from tempflow_api.conditions import ConditionType, Reason, is_true
from tempflow_operator.decisions.plan import Delete
from tests.builders import make_gang, make_job, make_pod
from tests.unit.operator.decisions.stories import Story, started


def test_cancel_stops_the_pods_and_is_the_end() -> None:
    story = started()
    story.job.spec("runPolicy.cancel", True)
    running = (make_gang().started(), make_pod().running())
    assert Delete("Job", "demo-a1", "gang-1") in story.look(*running, parts=(1,), seconds=5)
    assert story.reason(ConditionType.FAILED) == Reason.CANCELLED
    assert not is_true(story.status.conditions, ConditionType.FINISHED)
    story.job.spec("runPolicy.cancel", False)
    assert story.look(seconds=9) == []
    assert is_true(story.status.conditions, ConditionType.FINISHED)
    assert story.status.attempts[-1].outcome == "Cancelled"


def test_cancel_of_a_suspended_job() -> None:
    story = Story(make_job().suspended().spec("runPolicy.cancel", True))
    assert story.look() == []
    assert story.reason(ConditionType.FAILED) == Reason.CANCELLED


def test_what_completes_in_the_moment_of_a_cancel_has_completed() -> None:
    story = started()
    story.job.spec("runPolicy.cancel", True)
    story.look(make_gang().started().complete(5), seconds=6)
    assert story.status.phase == "Succeeded"
