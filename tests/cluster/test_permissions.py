"""What all tests made the operator ask for, beside what the chart grants; runs after them."""

import asyncio
from datetime import UTC, datetime

import pytest

from tempflow_operator import desired
from tempflow_operator.cluster import Cluster
from tempflow_operator.decisions.events import Event, Tell
from tempflow_operator.decisions.observed import Key
from tempflow_operator.decisions.plan import Create
from tempflow_operator.metrics import Metrics
from tests.builders import T0, make_job
from tests.cluster import bare, rbac, scenario
from tests.cluster.bare import Bare
from tests.cluster.lives import NAMESPACE, SETTINGS, connect, connect_operator, submit
from tests.cluster.target import Target

pytestmark = pytest.mark.cluster


def everything_is_selected(request: pytest.FixtureRequest) -> bool:
    selected = {item.path for item in request.session.items}
    files = request.path.parent.glob("test_*.py")
    return selected >= {file for file in files if "pytest.mark.cluster" in file.read_text()}


def test_what_a_lost_answer_leaves_in_doubt_may_be_looked_at(bare_server: Bare) -> None:
    """An operator creates each object, and tells of it, without learning that it has; the next one
    finds the names taken, and that they are its own."""
    asyncio.run(_everything_twice(bare_server))


async def _everything_twice(server: Bare) -> None:
    name, reward = "twice", {"name": "digit", "placement": "service"}
    job = make_job(name).spec("rewards", [reward]).spec("compute.network", {"policy": True})
    admin = Cluster(connect(server), Metrics())
    operator = Cluster(connect_operator(server), Metrics())
    try:
        await submit(admin, job)
        seen = await operator.observe(Key(NAMESPACE, name))
        assert seen is not None
        assert seen.job.spec is not None
        attempt = desired.AttemptOf(
            job=name, namespace=NAMESPACE, uid=seen.job.uid, spec=seen.job.spec, number=1
        )
        objects = desired.objects(attempt, SETTINGS.pods)
        kinds = {"Service", "NetworkPolicy", "Deployment", "Job", "ConfigMap"}
        assert {one["kind"] for one in objects} == kinds
        for _ in range(2):
            for one in objects:
                await operator.execute(NAMESPACE, Create(one))
            started = Tell(Event("Normal", "AttemptStarted", "attempt 1"), 1)
            await operator.tell(seen.job, started, T0, "operator-1")
    finally:
        await admin.close()
        await operator.close()
    server.kubectl.run("delete", "tempflowgrpojob", name, "-n", NAMESPACE)


def test_nothing_is_asked_for_that_is_not_granted(bare_server: Bare) -> None:
    """By the tests that were selected, on the control plane without nodes."""
    asked = _asked_of(bare_server)
    assert not asked.forbidden
    assert asked.allowed <= rbac.granted(bare_server.kubectl, scenario.RELEASE, scenario.SYSTEM)


def test_the_operator_needs_each_of_its_permissions_and_no_other(
    request: pytest.FixtureRequest, cluster: Target, bare_server: Bare, started_at: datetime
) -> None:
    audit_log = cluster.our_own("the API server's audit log").state.audit_log
    if not everything_is_selected(request):
        pytest.skip("shows something only after all the other tests of the cluster")
    request.getfixturevalue("release")
    asked = rbac.requests_of(scenario.OPERATOR_USER, audit_log, since=started_at)
    asked |= _asked_of(bare_server)

    granted = rbac.granted(cluster.kubectl, scenario.RELEASE, scenario.SYSTEM)
    assert asked.allowed == granted
    # What is granted is refused while the chart is installed or removed, and by a server that has
    # just started and not read its roles yet.
    assert asked.forbidden <= granted


def _asked_of(server: Bare) -> rbac.Asked:
    beginning = datetime.min.replace(tzinfo=UTC)
    return rbac.requests_of(bare.OPERATOR, server.audit_log, since=beginning)
