"""`make push-images` of docs/install.md, typed at a real registry on loopback."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from tests.cluster import build
from tests.cluster.waiting import Say
from tests.documents.desk import Desk
from tests.documents.pages import ROOT, commands

pytestmark = pytest.mark.cluster

IMAGES = ("tempflow-operator", "tempflow-trainer")
FORMAT = "application/vnd.oci.image.manifest.v1+json"
INSECURE = '[[registry]]\nlocation = "{address}"\ninsecure = true\n'


def buildah(*arguments: str) -> str:
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"buildah {' '.join(arguments)}: {done.stderr[-1000:]}"
    return done.stdout.strip()


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
    [version] = [c for c in commands(ROOT / "docs/install.md") if c.startswith("export VERSION=")]
    names = [f"{registry}/project/{image}:{version.partition('=')[2]}" for image in IMAGES]
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


def test_make_push_images_word_for_word(
    registry: str, made: dict[str, str], tmp_path: Path
) -> None:
    settings = tmp_path / "registries.conf"
    settings.write_text(INSECURE.format(address=registry))
    page = commands(ROOT / "docs/install.md")
    exports = [c.replace("REGISTRY/PROJECT", f"{registry}/project") for c in page if "export" in c]
    shell = Desk(
        ROOT,
        {
            **os.environ,
            "CONTAINERS_REGISTRIES_CONF": str(settings),
            "CONTAINER_TOOL": "buildah",
        },
    )
    [command] = [c for c in page if c.startswith("make push-images")]
    shell.run("\n".join([*exports, command]))
    found = {name: pushed(name) for name in made}
    assert {name: config for name, (_, config) in found.items()} == {
        name: f"sha256:{image_id}" for name, image_id in made.items()
    }
    assert len({digest for digest, _ in found.values()}) == len(IMAGES)
