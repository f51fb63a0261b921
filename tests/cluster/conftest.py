"""Fixtures of the cluster tests: the cluster, a namespace, an S3 store, the installed project."""

import os
import platform
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tempflow_api import crd, naming
from tests.cluster import bare, build, foreign, project_images, rbac, scenario, target
from tests.cluster.apiserver import ApiServer
from tests.cluster.bare import Bare
from tests.cluster.cluster import down, ensure_up
from tests.cluster.kubectl import Kubectl
from tests.cluster.layout import DEFAULT_STATE, KUBECONFIG_VARIABLE, StateFolder
from tests.cluster.project_images import ProjectImages
from tests.cluster.s3 import S3
from tests.cluster.s3_server import S3Server
from tests.cluster.scenario import Release, Store
from tests.cluster.target import Target
from tests.cluster.waiting import Say, progress_lines, wait_for
from tests.cluster.witness import Witnessed, witness

SHOWN = 4  # names of tests that were left out for one reason


def pytest_report_header() -> str:
    kubeconfig = foreign.kubeconfig()
    if kubeconfig:
        return f"cluster: {kubeconfig}; what may be done to our own alone is left out and told last"
    return "cluster: our own, on this machine"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which cluster tests were left out, and why: a green run is no word about them."""
    names: dict[str, list[str]] = defaultdict(list)
    for report in terminalreporter.getreports("skipped"):
        if report.nodeid.startswith("tests/cluster/"):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            names[reason].append(report.nodeid.rpartition("::")[2])
    if not names:
        return
    terminalreporter.section(f"{sum(map(len, names.values()))} cluster tests left out")
    for reason, left_out in names.items():
        more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        terminalreporter.line(f"{len(left_out)}: {reason}")
        terminalreporter.line(f"   {', '.join(left_out[:SHOWN])}{more}")


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
def cluster(
    request: pytest.FixtureRequest, say: Say, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """The cluster; one that the tests started is ended after them, one that was up stays up."""
    kubeconfig = foreign.kubeconfig()
    if kubeconfig:
        yield foreign.target(kubeconfig, tmp_path_factory.mktemp("logs"), say)
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
def binaries(say: Say) -> Path:
    """Kubernetes' programs, for an API server of the tests' own. For the tests of another cluster
    they are not built, as that takes long and those need none; but used when they are there."""
    if platform.system() != "Linux":
        pytest.skip("the binaries are built for Linux")
    if foreign.kubeconfig() and not build.has_binaries():
        pytest.skip("needs Kubernetes' programs, which python tests/cluster/build.py builds")
    return build.binaries(say)


@pytest.fixture(scope="session")
def bare_server(
    binaries: Path, say: Say, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bare]:
    """A control plane without nodes, which knows the project's resource definition. Its user
    ``OPERATOR`` may do what the chart grants."""
    folder = tmp_path_factory.mktemp("bare")
    tools = build.kubectl_and_helm(say)
    with bare.running(binaries, tools / "kubectl", folder) as server:
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
def s3_server(cluster: Target, say: Say) -> Iterator[S3Server]:
    """The S3 server on the bridge; only our own cluster's pods can reach it."""
    server = cluster.our_own("an S3 server that it may kill").s3_server(say)
    server.start()
    yield server
    server.kill()  # nothing of its data is needed any more


@pytest.fixture(scope="session")
def s3(request: pytest.FixtureRequest, cluster: Target) -> Iterator[S3]:
    """The store of that server; of another cluster, the one that variables name."""
    if cluster.own is None:
        yield from foreign.s3()
    else:
        yield request.getfixturevalue("s3_server").store


@pytest.fixture(scope="session")
def images(cluster: Target, say: Say) -> ProjectImages:
    """Built from this working copy, and on the nodes; of another cluster, those it is told."""
    if cluster.own is None:
        return foreign.images()
    images = project_images.build(say)
    project_images.bring_in(cluster.own, images.operator, say)
    project_images.bring_in(cluster.own, images.trainer, say)
    return images


@pytest.fixture(scope="session")
def release(cluster: Target, images: ProjectImages, say: Say) -> Iterator[Release]:
    """The chart, installed with the project's images."""
    release = Release(cluster)
    try:
        release.install(images, *scenario.IMPATIENT)
        say("chart installed")
        yield release
        release.save_logs(cluster.logs)
    finally:
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
def user(cluster: Target, s3: S3, team: str, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    # The team goes before the store that its pods write to: the fixture after it is ended first.
    return scenario.create_user(cluster.kubectl, team, s3, tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="session")
def store(s3: S3) -> Store:
    return Store(s3)


@pytest.fixture(scope="session")
def undisturbed(
    *,
    user: Kubectl,
    team: str,
    s3: S3,
    store: Store,
    cluster: Target,
    say: Say,
    tmp_path_factory: pytest.TempPathFactory,
) -> Witnessed:
    """The short job, left alone, with GPUs where there are any."""
    started = time.monotonic()
    gpus = min(1, cluster.gpus_of_a_node())
    job = scenario.submit(user, team, s3, "undisturbed", compute__gpusPerProcess=gpus)
    seen = witness(job, store, tmp_path_factory.mktemp("result") / "digits")
    say(f"undisturbed job ended and pulled after {time.monotonic() - started:.0f} s")
    return seen


@pytest.fixture(scope="session")
def api(binaries: Path, tmp_path_factory: pytest.TempPathFactory, say: Say) -> Iterator[ApiServer]:
    """etcd and an API server of the tests' own, with our custom resource."""
    folder = tmp_path_factory.mktemp("api")
    server = ApiServer(StateFolder(folder), binaries, build.kubectl_and_helm(say) / "kubectl")
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
