"""Fixtures of the cluster tests: the cluster, a namespace, an S3 server, the installed project."""

import os
import platform
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from tempflow_api import crd, naming
from tests.cluster import bare, build, project_images, rbac, scenario, target
from tests.cluster.apiserver import ApiServer
from tests.cluster.bare import Bare
from tests.cluster.cluster import down, ensure_up
from tests.cluster.kubectl import Kubectl
from tests.cluster.layout import DEFAULT_STATE, StateFolder
from tests.cluster.project_images import ProjectImages
from tests.cluster.s3 import S3Server
from tests.cluster.scenario import Release, Store
from tests.cluster.target import KUBECONFIG_VARIABLE, Target
from tests.cluster.waiting import Say, progress_lines, wait_for
from tests.cluster.witness import Witnessed, witness


def pytest_report_header() -> str:
    kubeconfig = os.environ.get(KUBECONFIG_VARIABLE)
    if kubeconfig:
        return f"cluster: {kubeconfig}; tests that kill nodes or need our S3 server are left out"
    return "cluster: our own, on this machine"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What was asked for in all tests is looked at after them."""
    items.sort(key=lambda item: item.path.name == "test_permissions.py")


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Say:
    """Progress lines past pytest's capture: a first start builds for many minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    line = progress_lines()

    def say_uncaptured(text: str) -> None:
        if capture is None:
            line(text)
            return
        with capture.global_and_fixture_disabled():
            line(text)

    return say_uncaptured


@pytest.fixture(scope="session", autouse=True)
def started_at() -> datetime:
    """Before the first test: the audit log of a cluster that stays up knows of earlier ones."""
    return datetime.now(UTC)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, say: Say) -> Iterator[Target]:
    """The cluster; one that the tests started is ended after them, one that was up stays up."""
    kubeconfig = os.environ.get(KUBECONFIG_VARIABLE)
    if kubeconfig:
        yield target.foreign(kubeconfig, say)
        return
    if platform.system() != "Linux" or os.geteuid() != 0:
        pytest.skip(f"needs root on Linux, or {KUBECONFIG_VARIABLE} with another cluster")
    state = StateFolder(DEFAULT_STATE)
    try:
        ours, started = ensure_up(state, say)
    except BaseException:
        down(state, say, keep_logs=True)
        raise
    yield target.own(ours)
    if started:
        down(state, say, keep_logs=request.session.testsfailed > 0)


@pytest.fixture(scope="session")
def bare_server(say: Say, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    """A control plane without nodes, which knows the project's resource definition. Its user
    ``OPERATOR`` may do what the chart grants."""
    if platform.system() != "Linux":
        pytest.skip("the binaries are built for Linux")
    folder = tmp_path_factory.mktemp("bare")
    tools = build.kubectl_and_helm(say)
    with bare.running(build.binaries(say), tools / "kubectl", folder) as server:
        server.kubectl.run("apply", "-f", "-", stdin=crd.document())
        server.kubectl.wait_established(f"{naming.PLURAL}.{naming.GROUP}")
        rbac.grant(server.kubectl, bare.OPERATOR, name=scenario.RELEASE, namespace=scenario.SYSTEM)
        yield server


@pytest.fixture
def namespace(cluster: Target) -> Iterator[str]:
    """A namespace of the test's own; its removal is not waited for."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl.run("create", "namespace", name)
    yield name
    cluster.kubectl.run("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def s3(cluster: Target, say: Say) -> Iterator[S3Server]:
    """The S3 server on the bridge; only our own cluster's pods can reach it."""
    server = cluster.our_own().s3_server(say)
    server.start()
    yield server
    server.kill()  # nothing of its data is needed any more


@pytest.fixture(scope="session")
def images(cluster: Target, say: Say) -> ProjectImages:
    """Built from this working copy, and on the nodes."""
    ours = cluster.our_own()
    images = project_images.build(say)
    project_images.bring_in(ours, images.operator, say)
    project_images.bring_in(ours, images.trainer, say)
    return images


@pytest.fixture(scope="session")
def release(cluster: Target, images: ProjectImages, say: Say) -> Iterator[Release]:
    """The chart, installed with images built from this working copy."""
    release = Release(cluster)
    release.install(images, *scenario.IMPATIENT)
    say("chart installed")
    yield release
    release.save_logs(cluster.our_own().state.logs)
    release.uninstall()


@pytest.fixture(scope="session")
def team(cluster: Target, release: Release) -> Iterator[str]:
    """A namespace in which a user has the chart's edit role."""
    assert release
    name = f"team-{uuid.uuid4().hex[:8]}"
    cluster.kubectl.run("create", "namespace", name)
    yield name
    cluster.kubectl.run("delete", "namespace", name, "--timeout=2m")


@pytest.fixture(scope="session")
def user(
    cluster: Target, team: str, s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Kubectl:
    s3.create_bucket(scenario.BUCKET)
    return scenario.create_user(cluster.kubectl, team, s3, tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="session")
def store(s3: S3Server) -> Store:
    return Store(s3)


@pytest.fixture(scope="session")
def undisturbed(
    user: Kubectl,
    team: str,
    s3: S3Server,
    store: Store,
    say: Say,
    tmp_path_factory: pytest.TempPathFactory,
) -> Witnessed:
    """The short job, left alone."""
    started = time.monotonic()
    job = scenario.submit(user, team, s3, "undisturbed", compute__gpusPerProcess=1)
    seen = witness(job, store, tmp_path_factory.mktemp("result") / "digits")
    say(f"undisturbed job ended and pulled after {time.monotonic() - started:.0f} s")
    return seen


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory, say: Say) -> Iterator[ApiServer]:
    """etcd and an API server of the tests' own, with our custom resource."""
    folder = tmp_path_factory.mktemp("api")
    server = ApiServer(
        StateFolder(folder), build.binaries(say), build.kubectl_and_helm(say) / "kubectl"
    )
    try:
        server.start_etcd()
        server.start()
        crd = project_images.ROOT / "charts/tempflow/files/crd.yaml"
        server.kubectl.run("apply", "-f", str(crd))
        server.kubectl.wait_established(f"{naming.PLURAL}.{naming.GROUP}")
        # Established is said a moment before it is served.
        wait_for("our kind", lambda: server.serves(naming.PLURAL), deadline_seconds=20)
        server.start_garbage_collector()
        yield server
    finally:
        server.end()
