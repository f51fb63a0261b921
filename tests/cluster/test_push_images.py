"""`make push-images` of docs/install.md, typed at a real registry on loopback."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from tests.cluster import build, foreign, project_images
from tests.cluster.waiting import Say
from tests.documents.desk import Desk
from tests.documents.pages import ROOT, commands

pytestmark = pytest.mark.cluster

IMAGES = ("tempflow-operator", "tempflow-trainer")
FORMAT = "application/vnd.oci.image.manifest.v1+json"
BASE = "library/python:3.11-slim-bookworm"
REGISTRIES = """
unqualified-search-registries = ["docker.io"]
[[registry]]
location = "{address}"
insecure = true
[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "{address}"
insecure = true
"""


def buildah(*arguments: str) -> str:
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"buildah {' '.join(arguments)}: {done.stderr[-1000:]}"
    return done.stdout.strip()


def version() -> str:
    """As the page exports it."""
    page = (ROOT / "docs/install.md").read_text()
    [found] = re.findall(r"^export VERSION=(.+)$", page, re.M)
    return str(found)


@pytest.fixture(autouse=True)
def ours() -> None:
    """These have nothing to do with a cluster, and install packages on this machine."""
    if foreign.kubeconfig():
        pytest.skip("builds images here; what another cluster runs is given")


@pytest.fixture
def registry(say: Say) -> Iterator[str]:
    """The address of a registry that is empty."""
    build.install_packages(say)
    program = build.program(build.REGISTRY, say)
    with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        yield server.stdout.readline().strip()
        server.kill()


@pytest.fixture
def made(registry: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Two images of one small file each where `make images` would leave ours: name and id."""
    names = [f"{registry}/project/{image}:{version()}" for image in IMAGES]
    ids = {}
    for name in names:
        (tmp_path / "content").write_text(name)
        container = buildah("from", "scratch")
        buildah("add", "--quiet", container, str(tmp_path / "content"), "/")
        ids[name] = buildah("commit", "--quiet", "--rm", container, name)
    yield ids
    buildah("rmi", *names)


def test_the_packages_that_build_without_a_registry_have_these_names(say: Say) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("not Debian")
    build.install_packages(say)
    [command] = [c for c in commands(ROOT / "docs/install.md") if c.startswith("apt-get ")]
    Desk(ROOT).run(command)


def pushed(name: str) -> tuple[str, str]:
    """Digest of a manifest as the registry names it, and of the configuration in it."""
    address, _, path = name.partition("/")
    image, _, tag = path.rpartition(":")
    asked = Request(f"http://{address}/v2/{image}/manifests/{tag}", headers={"Accept": FORMAT})
    with build_opener(ProxyHandler({})).open(asked, timeout=10) as answer:
        content, digest = answer.read(), answer.headers["Docker-Content-Digest"]
    assert digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    return digest, json.loads(content)["config"]["digest"]


@pytest.fixture
def shell(registry: str, tmp_path: Path) -> Desk:
    """In the project's folder. The registry is also where the images of Docker's are looked for."""
    (tmp_path / "registries.conf").write_text(REGISTRIES.format(address=registry))
    own = {
        "CONTAINERS_REGISTRIES_CONF": str(tmp_path / "registries.conf"),
        "CONTAINER_TOOL": "buildah",
        **project_images.BUILD,
    }
    return Desk(ROOT, {**os.environ, **own})


def step(command: str, registry: str) -> str:
    """A command of the page, after what the page has exported before."""
    page = commands(ROOT / "docs/install.md")
    exports = [c for c in page if c.startswith("export ")]
    assert command in page
    return "\n".join([*exports, command]).replace("REGISTRY/PROJECT", f"{registry}/project")


@pytest.fixture
def base(registry: str, say: Say) -> Iterator[str]:
    """Where the Dockerfile's base image is looked for, ours, so that the layers of the other tests'
    images fit."""
    name = f"docker.io/{BASE}"
    if project_images.exists(name):
        pytest.skip(f"this machine has {name}, on which all layers would be built anew")
    project_images.make_base(say)
    buildah("push", "--tls-verify=false", project_images.BASE_IMAGE, f"{registry}/{BASE}")
    yield name
    if project_images.exists(name):
        buildah("rmi", name)


def test_make_images_word_for_word(registry: str, base: str, shell: Desk) -> None:
    told = shell.run(step("make images", registry))
    assert project_images.exists(base), "the base image is not from the registry"
    names = [f"{registry}/project/{image}:{version()}" for image in IMAGES]
    buildah("rmi", *names)
    assert [name for name in names if f"{name}: " not in told] == []


def test_make_push_images_word_for_word(registry: str, made: dict[str, str], shell: Desk) -> None:
    shell.run(step("make push-images", registry))
    found = {name: pushed(name) for name in made}
    assert {name: config for name, (_, config) in found.items()} == {
        name: f"sha256:{image_id}" for name, image_id in made.items()
    }
    assert len({digest for digest, _ in found.values()}) == len(IMAGES)
