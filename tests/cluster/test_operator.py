"""The operator on the cluster, as a user meets it: from the chart to a picture of a digit.

One job is left alone. The others are that job, struck once after their first checkpoint, and have
to end with the very same adapter.
"""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from tempflow_api import naming
from tempflow_api.conditions import ConditionType, Reason
from tempflow_api.errors import ExitCode
from tempflow_api.status import Progress
from tests.cluster import scenario
from tests.cluster.controlplane import requests_in
from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import Kubectl
from tests.cluster.layout import GPU_RESOURCE
from tests.cluster.s3 import S3
from tests.cluster.scenario import Release, Store, Submission, submit
from tests.cluster.target import Target
from tests.cluster.waiting import wait_for
from tests.cluster.witness import Witnessed, ends_as_if_nothing_had_happened
from tests.drawn_digits import share_found

pytestmark = pytest.mark.cluster

# docs/operator.md says 16 s; the rest is for this test to look.
HAND_OVER_SECONDS = 20
STATUS_WRITES_OF_A_RUN = 6
KILL = """
import os, signal
for pid in pids:
    os.kill(pid, signal.SIGKILL)
    print(pid)
"""


@pytest.fixture
def job(request: pytest.FixtureRequest, user: Kubectl, team: str, s3: S3) -> Iterator[Submission]:
    """The short job, named after the test, running and with its first checkpoint committed."""
    name = request.function.__name__.removeprefix("test_").replace("_", "-")[:30].rstrip("-")
    job = submit(user, team, s3, name)
    Store(s3).wait_first_commit(job)
    yield job
    job.delete()


def test_helm_test_passes(release: Release) -> None:
    assert "OK: jobs are checked" in release.test()


def test_all_conditions_are_there_from_the_first_second(undisturbed: Witnessed) -> None:
    created = datetime.fromisoformat(undisturbed.job.raw()["metadata"]["creationTimestamp"])
    first = next(status for status in undisturbed.statuses if status.conditions)

    assert {condition.type for condition in first.conditions} == set(ConditionType)
    for condition in first.conditions:
        assert condition.observed_generation == 1
        known = datetime.fromisoformat(condition.last_transition_time)
        assert (known - created).total_seconds() <= 2


def test_one_pod_with_its_gpu_runs_on_each_node(undisturbed: Witnessed, cluster: Target) -> None:
    if len(cluster.nodes()) < 2 or not cluster.gpus_of_a_node():
        pytest.skip("the cluster has not two nodes with GPUs")
    assert len(set(undisturbed.nodes)) == len(undisturbed.nodes) == 2
    for pod in undisturbed.job.pods():
        (trainer,) = (c for c in pod["spec"]["containers"] if c["name"] == naming.TRAINER_CONTAINER)
        assert trainer["resources"]["limits"][GPU_RESOURCE] == "1"


def test_progress_moves_while_a_job_runs_and_deletion_stops_it(
    user: Kubectl, team: str, s3: S3
) -> None:
    job = submit(user, team, s3, "endless", algorithm__epochs=100_000)
    seen: list[Progress] = []

    def moved() -> bool:
        status = job.status()
        if status.progress is not None and status.phase == "Running":
            seen.append(status.progress)
        return len({progress.epoch for progress in seen if progress.epoch > 0}) >= 2

    wait_for("two different epochs", moved, deadline_seconds=300, poll_seconds=0.5)
    epochs = [progress.epoch for progress in seen]
    assert epochs == sorted(epochs)
    assert seen[-1].reward is not None
    assert job.status().progress_text == f"{epochs[-1]}/100000"
    assert job.condition(ConditionType.CHECKPOINTED).status == "True"

    job.delete()
    assert not job.pods()


def test_the_status_is_written_seldom(undisturbed: Witnessed, cluster: Target) -> None:
    """Of progress, once in 15 s; the others tell of the start, of pods, checkpoints and the end."""
    audit_log = cluster.our_own("the API server's audit log").state.audit_log
    status = undisturbed.statuses[-1]
    times = (status.start_time, status.completion_time)
    started, completed = (datetime.fromisoformat(str(when)) for when in times)
    of_progress = (completed - started).total_seconds() / 15
    assert status_writes(audit_log, undisturbed.job) <= of_progress + STATUS_WRITES_OF_A_RUN


def status_writes(audit_log: Path, job: Submission) -> int:
    """How often the operator has written the job's status."""
    about = {"resource": naming.PLURAL, "namespace": job.namespace, "name": job.name}
    about["subresource"] = "status"
    return sum(
        request["user"].get("username") == scenario.OPERATOR_USER
        and request["verb"] == "patch"
        and about.items() <= request.get("objectRef", {}).items()
        for request in requests_in(audit_log)
    )


def test_the_end_is_told_and_holds_nothing(undisturbed: Witnessed) -> None:
    job = undisturbed.job
    status = undisturbed.statuses[-1]

    job.wait(ConditionType.FINISHED, deadline_seconds=5)
    assert status.phase == "Succeeded"
    assert status.progress is not None
    assert (status.progress.epoch, status.progress.phase) == (scenario.EPOCHS, "done")
    assert status.checkpoint is not None
    assert status.checkpoint.epoch == scenario.EPOCHS
    assert [attempt.outcome for attempt in status.attempts] == ["Succeeded"]
    assert (status.restarts.failures, status.restarts.disruptions) == (0, 0)
    assert not job.live_pods()


def test_the_reward_rises(undisturbed: Witnessed, store: Store) -> None:
    """Of pictures that are drawn from the same noise before and after; judged by a network that
    training did not see, too."""
    before, after = store.evaluations(undisturbed.job)
    assert (before["epoch"], after["epoch"]) == (0, scenario.EPOCHS)
    assert after["reward"] > before["reward"] + 0.3
    judged = [told["rewards"]["digit-judge"]["mean"] for told in (before, after)]
    assert judged[1] > judged[0] + 0.1


def test_the_checkpoint_is_listed_pulled_and_drawn_with(
    undisturbed: Witnessed, store: Store, tmp_path: Path
) -> None:
    assert f" {scenario.EPOCHS} " in store.list(undisturbed.job).replace("\n", " \n ")

    picture = tmp_path / "three.png"
    scenario.tempflow(
        *("sample", str(undisturbed.folder), "--prompt", "a three", "--count", "16"),
        *("--out", str(picture)),
    )

    assert share_found(picture, "a three", 16) > 0.5


def test_a_rank_that_is_killed(
    job: Submission, undisturbed: Witnessed, store: Store, cluster: Target, tmp_path: Path
) -> None:
    killed = job.run_beside(cluster.kubectl, 1, KILL)
    assert len(killed.split()) == 1

    status = ends_as_if_nothing_had_happened(job, undisturbed, store, tmp_path)

    assert [attempt.outcome for attempt in status.attempts] == ["Failed", "Succeeded"]
    failure = status.attempts[0].failure
    assert failure is not None
    assert (failure.container, failure.exit_code) == ("trainer", ExitCode.RANK_DIED)
    assert failure.node in cluster.node_names()
    assert (status.restarts.failures, status.restarts.disruptions) == (1, 0)


def test_a_pod_that_is_deleted(
    job: Submission, undisturbed: Witnessed, store: Store, cluster: Target, tmp_path: Path
) -> None:
    victim = job.live_pods()[0]
    cluster.kubectl.run("delete", "pod", victim, "-n", job.namespace, "--wait=false")

    status = ends_as_if_nothing_had_happened(job, undisturbed, store, tmp_path)

    assert [attempt.outcome for attempt in status.attempts] == ["Disrupted", "Succeeded"]
    assert (status.restarts.failures, status.restarts.disruptions) == (0, 1)


@pytest.fixture
def own_node(cluster: Target) -> None:
    cluster.our_own("a node on which it may kill the operator's process")


@pytest.mark.usefixtures("own_node")  # before a job is submitted for it
def test_the_leading_operator_is_killed_when_it_is_needed(
    *,
    job: Submission,
    undisturbed: Witnessed,
    store: Store,
    release: Release,
    cluster: Target,
    tmp_path: Path,
) -> None:
    """A pod of the job goes, and the operator with it: another replica starts the next attempt."""
    leader = release.leader()
    victim = job.live_pods()[0]
    cluster.kubectl.run("delete", "pod", victim, "-n", job.namespace, "--wait=false")
    release.kill(leader)
    wait_for(
        "another leader",
        lambda: release.leader() not in ("", leader),
        deadline_seconds=HAND_OVER_SECONDS,
        poll_seconds=0.5,
    )

    status = ends_as_if_nothing_had_happened(job, undisturbed, store, tmp_path)

    assert [attempt.outcome for attempt in status.attempts] == ["Disrupted", "Succeeded"]
    assert (status.restarts.failures, status.restarts.disruptions) == (0, 1)


def test_suspended_and_resumed(
    job: Submission, undisturbed: Witnessed, store: Store, tmp_path: Path
) -> None:
    job.patch('{"spec": {"runPolicy": {"suspend": true}}}')
    job.wait(ConditionType.SUSPENDED, deadline_seconds=90)
    held = job.status()
    assert held.phase == "Suspended"
    assert not job.live_pods()

    job.patch('{"spec": {"runPolicy": {"suspend": false}}}')
    status = ends_as_if_nothing_had_happened(job, undisturbed, store, tmp_path)

    assert [attempt.outcome for attempt in status.attempts] == ["Suspended", "Succeeded"]
    assert (status.restarts.failures, status.restarts.disruptions) == (0, 0)


def test_an_image_that_cannot_be_pulled(user: Kubectl, team: str, s3: S3) -> None:
    job = submit(user, team, s3, "no-image", compute__image="localhost/nowhere:1")

    why = job.wait_reason(ConditionType.RUNNING, Reason.IMAGE_PULL_FAILED, deadline_seconds=60)

    assert "localhost/nowhere:1" in why.message
    assert job.status().phase == "Starting"
    job.delete()


def test_gpus_that_no_node_has(user: Kubectl, team: str, s3: S3, cluster: Target) -> None:
    if cluster.gpus_of_a_node() > 8:
        pytest.skip("a node of the cluster has nine GPUs")
    job = submit(
        *(user, team, s3, "nine-gpus"),
        compute__nodes=1,
        compute__device="cuda",
        compute__processesPerNode=9,
        algorithm__seedsPerPrompt=3,
    )

    why = job.wait_reason(ConditionType.RUNNING, Reason.UNSCHEDULABLE, deadline_seconds=60)

    assert "Insufficient nvidia.com/gpu" in why.message
    job.delete()


def test_a_configuration_that_the_api_server_refuses(user: Kubectl, team: str, s3: S3) -> None:
    bad = yaml.safe_load(scenario.manifest("bad", s3, {}))
    bad["spec"]["algorithm"]["branchesPerSeed"] = 1

    with pytest.raises(ClusterError, match="a group needs two draws to compare"):
        user.run("apply", "-n", team, "-f", "-", stdin=yaml.safe_dump(bad))


def test_a_bucket_that_is_missing_and_a_time_to_live(user: Kubectl, team: str, s3: S3) -> None:
    bucket = f"missing-{team}"  # the store may be of an earlier session, and hold its buckets
    job = submit(user, team, s3, "no-bucket", checkpoint__uri=f"s3://{bucket}/runs")

    job.wait(ConditionType.FAILED, deadline_seconds=120)

    status = job.status()
    why = job.condition(ConditionType.FAILED)
    assert why.reason == Reason.PERMANENT_FAILURE
    assert bucket in why.message
    assert [attempt.outcome for attempt in status.attempts] == ["Failed"]
    failure = status.attempts[0].failure
    assert failure is not None
    assert failure.exit_code == ExitCode.STORE
    assert (status.restarts.failures, status.restarts.disruptions) == (0, 0)

    job.patch('{"spec": {"runPolicy": {"ttlSecondsAfterFinished": 0}}}')
    wait_for("the job to be deleted", job.is_gone, deadline_seconds=60)


def test_a_name_that_somebody_else_has(user: Kubectl, team: str, s3: S3, cluster: Target) -> None:
    theirs = naming.attempt_name("taken", 1)
    cluster.kubectl.run("create", "service", "clusterip", theirs, "--clusterip=None", "-n", team)

    job = submit(user, team, s3, "taken", compute__image="localhost/nowhere:1")
    why = job.wait_reason(ConditionType.RUNNING, Reason.NAME_TAKEN, deadline_seconds=30)
    assert theirs in why.message

    cluster.kubectl.run("delete", "service", theirs, "-n", team)
    job.wait_reason(ConditionType.RUNNING, Reason.IMAGE_PULL_FAILED, deadline_seconds=60)
    job.delete()


def metrics_of_server(admin: Kubectl, namespace: str, pod: str) -> str:
    """What a reward's server tells Prometheus."""
    url = f"http://127.0.0.1:{naming.REWARD_PORT}/metrics"
    program = f"import urllib.request as r; print(r.urlopen('{url}').read().decode())"
    return admin.run("exec", pod, "-n", namespace, "--", "python", "-c", program)


def test_a_reward_that_the_operator_serves(
    user: Kubectl, team: str, s3: S3, cluster: Target
) -> None:
    """One of two. First with an image that does not exist, which is corrected while the job is
    suspended."""
    reward, nowhere = "digit-log-probability", "localhost/nowhere:1"
    job = submit(
        *(user, team, s3, "served"),
        rewards=f"[{{name: {reward}, placement: service}}, {{name: digit-ink}}]",
        compute__rewardPods=f'[{{reward: {reward}, image: "{nowhere}"}}]',
        compute__nodes=1,
        algorithm__epochs=8,
        checkpoint__everyEpochs=4,
    )
    why = job.wait_reason(ConditionType.RUNNING, Reason.IMAGE_PULL_FAILED, deadline_seconds=60)
    assert why.message.startswith(f"reward {reward}: pod served-a1-r0-")
    assert nowhere in why.message
    job.patch('{"spec": {"runPolicy": {"suspend": true}}}')
    job.wait(ConditionType.SUSPENDED, deadline_seconds=60)
    assert not job.live_pods()

    job.patch('{"spec": {"runPolicy": {"suspend": false}, "compute": {"rewardPods": []}}}')
    mark = f"{naming.LABEL_JOB_NAME}={job.name},{naming.LABEL_REWARD}={reward}"

    def scored() -> bool:
        (pod, *_) = user.items("pods", "-l", mark, namespace=team) or [{}]
        containers = pod.get("status", {}).get("containerStatuses") or [{"ready": False}]
        if not containers[0]["ready"]:
            return False
        told = metrics_of_server(cluster.kubectl, team, pod["metadata"]["name"])
        return f'images_total{{outcome="scored",reward="{reward}"}}' in told

    wait_for("scores of the service", scored, deadline_seconds=120)
    assert f"serves {reward} at" in user.run("logs", "-l", mark, "-n", team, "--tail=-1")
    job.wait(ConditionType.FINISHED, deadline_seconds=120)

    status = job.status()
    assert [attempt.outcome for attempt in status.attempts] == ["Suspended", "Succeeded"]
    assert (status.restarts.failures, status.restarts.disruptions) == (0, 0)

    def left() -> list[object]:
        parts = cluster.kubectl.items("deployments,services", "-l", mark, namespace=team)
        return [*job.live_pods(), *parts]

    wait_for("its servers gone", lambda: not left(), deadline_seconds=60)
    job.delete()
