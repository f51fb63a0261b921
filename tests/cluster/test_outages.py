"""Parts of the cluster fail under a running job: a node, the API server, the store, memory, room.

Each job is struck in mid-epoch after its first commit, and ends with the same adapter, byte for
byte, as the one that was left alone.
"""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tempflow_api import naming
from tempflow_api.conditions import ConditionType, Reason
from tempflow_api.errors import ExitCode
from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import Kubectl
from tests.cluster.layout import NODE_2
from tests.cluster.s3 import S3
from tests.cluster.s3_server import S3Server
from tests.cluster.scenario import COMMIT_EVERY, LOST_NODE_SECONDS, Store, Submission, submit
from tests.cluster.target import Target
from tests.cluster.waiting import Say, wait_for
from tests.cluster.witness import Witnessed, ends_as_if_nothing_had_happened

pytestmark = pytest.mark.cluster

OUTAGE_SECONDS = 60
API_OUTAGE_SECONDS = 5
GRACE_SECONDS = 15
MEMORY = "1Gi"  # /dev/shm is granted beside it: 3 GiB are the limit
# Takes the container's memory, in small processes: the kernel ends the largest first.
_HOG = """
import os, time
for pid in pids:
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
for _ in range(48):
    if os.fork() == 0:
        break
held = b"1" * (64 << 20)
time.sleep(60)
"""


class Queue:
    """A stand-in for a queue such as Kueue: all that it does to a Job is to set its suspension."""

    def __init__(self, admin: Kubectl, job: Submission) -> None:
        self._admin, self._job = admin, job
        self._gang = naming.attempt_name(job.name, 1)

    def admit(self) -> None:
        self._job.wait_reason(ConditionType.RUNNING, Reason.QUEUED, deadline_seconds=120)
        self._suspend(False)

    def take_back(self) -> None:
        self._suspend(True)

    def _suspend(self, suspended: bool) -> None:
        change = json.dumps({"spec": {"suspend": suspended}})
        self._admin.run("patch", "job", self._gang, "-n", self._job.namespace, "-p", change)


def run_out_of_memory(admin: Kubectl, job: Submission) -> None:
    """Something else in the container takes the memory that is left; the kernel ends the rank."""
    pod = job.pod_of_rank(1)
    with suppress(ClusterError):  # it ends with the container
        job.run_beside(admin, 1, _HOG)
    wait_for("the end of the rank", lambda: pod not in job.live_pods(), deadline_seconds=30)


def in_mid_run(job: Submission, store: Store) -> None:
    """Its first checkpoint is committed, and it has not ended."""
    store.wait_first_commit(job)
    assert job.status().phase == "Running"


@pytest.fixture(scope="module")
def struck(
    cluster: Target, user: Kubectl, team: str, s3: S3, store: Store, say: Say
) -> Iterator[dict[str, Submission]]:
    """Three jobs, each struck by something that the others do not feel.

    One is started when the one before is struck: what follows overlaps.
    """
    starved = submit(user, team, s3, "starved", compute__memory=MEMORY)
    in_mid_run(starved, store)
    run_out_of_memory(cluster.kubectl, starved)
    say("memory taken")

    queued = submit(user, team, s3, "queued", runPolicy__queue="research")
    queue = Queue(cluster.kubectl, queued)
    queue.admit()
    in_mid_run(queued, store)
    queue.take_back()
    say("taken back into the queue")
    wait_for("the queued job's pods to go", lambda: not queued.live_pods(), deadline_seconds=120)
    queue.admit()
    wait_for(
        "a commit of the queued job after its return",
        lambda: store.has_committed(queued, 2 * COMMIT_EVERY, incarnation=2),
        deadline_seconds=300,
    )
    queue.take_back()
    say("taken back again")
    wait_for("the queued job's pods to go", lambda: not queued.live_pods(), deadline_seconds=120)
    queue.admit()

    jobs = [starved, queued]
    if cluster.own is not None:
        unwatched = submit(user, team, s3, "unwatched")
        jobs.append(unwatched)
        in_mid_run(unwatched, store)
        cluster.own.kill_apiserver()
        time.sleep(API_OUTAGE_SECONDS)
        cluster.own.restart_apiserver()
        say("API server restarted")
    yield {job.name: job for job in jobs}
    for job in jobs:
        job.delete()


def test_a_container_that_runs_out_of_memory(
    struck: dict[str, Submission], undisturbed: Witnessed, store: Store, tmp_path: Path
) -> None:
    status = ends_as_if_nothing_had_happened(struck["starved"], undisturbed, store, tmp_path)

    assert [attempt.outcome for attempt in status.attempts] == ["Failed", "Succeeded"]
    failure = status.attempts[0].failure
    assert failure is not None
    assert failure.reason == "OOMKilled"
    assert (status.restarts.failures, status.restarts.disruptions) == (1, 0)


def test_the_api_server_is_restarted(
    *,
    struck: dict[str, Submission],
    undisturbed: Witnessed,
    store: Store,
    cluster: Target,
    tmp_path: Path,
) -> None:
    cluster.our_own("an API server that it may kill")
    status = ends_as_if_nothing_had_happened(struck["unwatched"], undisturbed, store, tmp_path)

    assert [attempt.outcome for attempt in status.attempts] == ["Succeeded"]
    assert status.attempt == 1


def test_a_queue_takes_an_attempt_back_twice(
    struck: dict[str, Submission], undisturbed: Witnessed, store: Store, tmp_path: Path
) -> None:
    status = ends_as_if_nothing_had_happened(struck["queued"], undisturbed, store, tmp_path)

    assert [(one.number, one.outcome) for one in status.attempts] == [(1, "Succeeded")]
    restarts = status.restarts
    assert (restarts.failures, restarts.disruptions, restarts.preflights) == (0, 0, 0)


def test_the_store_is_down_for_a_minute(
    s3_server: S3Server,
    user: Kubectl,
    team: str,
    s3: S3,
    undisturbed: Witnessed,
    store: Store,
    say: Say,
    tmp_path: Path,
) -> None:
    job = submit(user, team, s3, "storeless")
    in_mid_run(job, store)
    s3_server.kill()
    try:
        time.sleep(OUTAGE_SECONDS)
    finally:
        s3_server.start()
    say("store back")

    status = ends_as_if_nothing_had_happened(job, undisturbed, store, tmp_path)

    # How many saves in a row failed, and so whether an attempt ended, is a matter of speed.
    for attempt in status.attempts[:-1]:
        assert attempt.failure is not None
        assert attempt.failure.exit_code == ExitCode.UNCOMMITTED
    job.delete()


def test_a_node_is_lost(
    cluster: Target,
    user: Kubectl,
    team: str,
    s3: S3,
    undisturbed: Witnessed,
    store: Store,
    say: Say,
    tmp_path: Path,
) -> None:
    ours = cluster.our_own("a node that it may kill")
    job = submit(user, team, s3, "nodeless", runPolicy__terminationGracePeriodSeconds=GRACE_SECONDS)
    in_mid_run(job, store)
    lost = time.monotonic()
    ours.kill_kubelet(NODE_2)
    ours.kill_containers(NODE_2)
    try:
        # The old pod on the lost node is never confirmed dead.
        wait_for("the second attempt", lambda: job.status().attempt == 2, deadline_seconds=180)
        say(f"second attempt {time.monotonic() - lost:.0f} s after the node was lost")
        assert time.monotonic() - lost >= GRACE_SECONDS + LOST_NODE_SECONDS
        job.wait(ConditionType.FINISHED, deadline_seconds=300)
    finally:
        ours.restart_kubelet(NODE_2)
    # Only now can the first attempt's pod there be confirmed dead.
    wait_for("the lost pod to go", lambda: not job.live_pods(), deadline_seconds=60)

    status = ends_as_if_nothing_had_happened(job, undisturbed, store, tmp_path)
    assert len(status.attempts) == 2
    job.delete()
