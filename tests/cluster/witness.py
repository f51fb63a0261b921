"""A job that is left alone, and the others, which have to end as it does, byte for byte."""

from dataclasses import dataclass, field
from pathlib import Path

from tempflow_api.conditions import ConditionType, is_true
from tempflow_api.status import JobStatus
from tests.cluster.scenario import Store, Submission
from tests.cluster.waiting import wait_for

END_SECONDS = 600


@dataclass
class Witnessed:
    """The job that was left alone: what was seen of it, and its result."""

    job: Submission
    statuses: list[JobStatus]
    nodes: list[str]
    digest: str = ""
    folder: Path = field(default_factory=Path)


def witness(job: Submission, store: Store, folder: Path) -> Witnessed:
    """Watch a job to its end, and pull its result into the folder."""
    statuses: list[JobStatus] = []

    def ended() -> bool:
        status = job.status()
        if not statuses or status != statuses[-1]:
            statuses.append(status)
        return is_true(status.conditions, ConditionType.FINISHED)

    wait_for("end of the undisturbed job", ended, deadline_seconds=END_SECONDS, poll_seconds=0.5)
    nodes = [pod["spec"]["nodeName"] for pod in job.pods()]
    return Witnessed(job, statuses, nodes, store.adapter_digest(job, folder), folder)


def ends_as_if_nothing_had_happened(
    job: Submission, undisturbed: Witnessed, store: Store, folder: Path
) -> JobStatus:
    """Wait for the end; returns the last status."""
    job.wait(ConditionType.FINISHED, deadline_seconds=END_SECONDS)
    status = job.status()
    assert status.phase == "Succeeded", status
    assert status.attempts[-1].outcome == "Succeeded"
    assert not job.live_pods()
    assert store.adapter_digest(job, folder / "result") == undisturbed.digest
    return status
