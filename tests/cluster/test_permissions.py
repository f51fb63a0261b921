"""What all tests made the operator ask for, beside what the chart grants; runs after them."""

from datetime import UTC, datetime

import pytest

from tests.cluster import bare, rbac, scenario
from tests.cluster.bare import Bare
from tests.cluster.target import Target

pytestmark = pytest.mark.cluster


def everything_is_selected(request: pytest.FixtureRequest) -> bool:
    selected = {item.path for item in request.session.items}
    files = request.path.parent.glob("test_*.py")
    return selected >= {file for file in files if "pytest.mark.cluster" in file.read_text()}


def test_nothing_is_asked_for_that_is_not_granted(bare_server: Bare) -> None:
    """By the tests that were selected, on the control plane without nodes."""
    asked = _asked_of(bare_server)
    assert not asked.forbidden
    assert asked.allowed <= rbac.granted(bare_server.kubectl, scenario.RELEASE, scenario.SYSTEM)


def test_the_operator_needs_each_of_its_permissions_and_no_other(
    request: pytest.FixtureRequest, cluster: Target, bare_server: Bare, started_at: datetime
) -> None:
    if not everything_is_selected(request):
        pytest.skip("shows something only after all the other tests of the cluster")
    request.getfixturevalue("release")
    audit_log = cluster.our_own().state.audit_log
    asked = rbac.requests_of(scenario.OPERATOR_USER, audit_log, since=started_at)
    asked |= _asked_of(bare_server)

    granted = rbac.granted(cluster.kubectl, scenario.RELEASE, scenario.SYSTEM)
    # Refused, too, only what is granted: while the chart is installed or removed, and by a server
    # that has just started and not read its roles yet.
    assert asked.allowed | asked.forbidden <= granted
    assert granted - asked.allowed == set(rbac.UNUSED_HERE)


def _asked_of(server: Bare) -> rbac.Asked:
    beginning = datetime.min.replace(tzinfo=UTC)
    return rbac.requests_of(bare.OPERATOR, server.audit_log, since=beginning)
