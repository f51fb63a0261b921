"""The project's own images: built from its Dockerfile with buildah, and brought into both nodes.

buildah's usual storage is used, so that `make images` and the tests share one cache of layers.
"""

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import nodes
from tests.cluster.cluster import Cluster
from tests.cluster.errors import ClusterError
from tests.cluster.layout import NODES
from tests.cluster.waiting import Say

ROOT = Path(__file__).resolve().parents[2]
BASE_IMAGE = "localhost/tempflow-base:bookworm"
REPOSITORY = "localhost"
TAG = "cluster-test"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# What the page on installing tells root in a container, and those behind a proxy, to set.
BUILD = {
    "BUILD_FLAGS": "--isolation chroot --network host",
    **({"CA_BUNDLE": str(_CERTIFICATES)} if _CERTIFICATES.exists() else {}),
}


@dataclass(frozen=True)
class ProjectImages:
    """Names of the two images, as pods give them."""

    operator: str = f"{REPOSITORY}/tempflow-operator:{TAG}"
    trainer: str = f"{REPOSITORY}/tempflow-trainer:{TAG}"

    def chart_values(self) -> list[str]:
        """The options with which helm installs them."""
        mark, key = ("@", "digest") if "@" in self.operator else (":", "tag")
        repository, _, version = self.operator.rpartition(mark)
        return [
            *("--set", f"image.repository={repository}", "--set", f"image.{key}={version}"),
            *("--set", f"trainerImage={self.trainer}"),
        ]


def make_base(say: Say) -> None:
    """The base image, where there is none yet."""
    if not exists(BASE_IMAGE):
        say(f"make {BASE_IMAGE} with debootstrap")
        _run([str(ROOT / "tools/base_image.sh"), BASE_IMAGE], CONTAINER_TOOL="buildah")


def build(say: Say) -> ProjectImages:
    """Build both; seconds when only the project's code has changed, minutes from nothing."""
    make_base(say)
    environment = {
        "CONTAINER_TOOL": "buildah",
        "IMAGE_REPOSITORY": REPOSITORY,
        "IMAGE_TAG": TAG,
        **BUILD,
    }
    started = time.monotonic()
    # As docs/install.md has it for a machine that reaches no registry.
    _run(["make", "-C", str(ROOT), "images", f"BASE_IMAGE={BASE_IMAGE}"], **environment)
    say(f"both images built in {time.monotonic() - started:.0f} s")
    return ProjectImages()


def bring_in(cluster: Cluster, image: str, say: Say) -> None:
    """Import an image into the nodes that do not have it, one thread a node.

    The archive lies beside the cluster's other files, and goes as soon as it is imported: the
    trainer's is 6 GB.
    """
    image_id = _image_id(image)
    lacking = [
        node for node in NODES if not nodes.holds_image(cluster.state, node, image, image_id)
    ]
    if not lacking:
        say(f"{image} is on the nodes already")
        return
    started = time.monotonic()
    archive = cluster.state.root / f"image-{image_id[:12]}.tar"
    archive.unlink(missing_ok=True)
    try:
        # Uncompressed: the nodes would only have to unpack it again, on the same disk.
        target = f"docker-archive:{archive}:{image}"
        _run(["buildah", "push", "--quiet", "--disable-compression", image, target])
        written = time.monotonic()
        with ThreadPoolExecutor(len(lacking)) as threads:
            list(
                threads.map(lambda node: nodes.import_image(cluster.state, node, archive), lacking)
            )
    finally:
        archive.unlink(missing_ok=True)
    say(
        f"{image} written in {written - started:.0f} s, "
        f"imported into {len(lacking)} nodes in {time.monotonic() - written:.0f} s"
    )


def exists(image: str) -> bool:
    command = ["buildah", "inspect", "--type", "image", image]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _image_id(image: str) -> str:
    """The digest of its configuration, by which a node knows it too."""
    command = ["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", image]
    return _run(command).strip()


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip())[-600:]
        raise ClusterError(f"{' '.join(command)[:200]} failed: {last}")
    return done.stdout
