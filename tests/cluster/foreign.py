"""A cluster that is not ours: what the tests need beside it is named by variables."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import build
from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import Kubectl
from tests.cluster.layout import KUBECONFIG_VARIABLE
from tests.cluster.project_images import ProjectImages
from tests.cluster.s3 import REGION, S3, Keys
from tests.cluster.scenario import DEFINITION, SYSTEM
from tests.cluster.target import Target
from tests.cluster.waiting import Say

BUSYBOX_VARIABLE = "TEMPFLOW_TEST_BUSYBOX_IMAGE"
IMAGE_VARIABLES = ("TEMPFLOW_TEST_OPERATOR_IMAGE", "TEMPFLOW_TEST_TRAINER_IMAGE")
S3_VARIABLES = ("TEMPFLOW_TEST_S3_ENDPOINT", "TEMPFLOW_TEST_S3_BUCKET")
KEY_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def kubeconfig() -> str | None:
    """Of the cluster to test instead of our own."""
    return os.environ.get(KUBECONFIG_VARIABLE)


def target(kubeconfig: str, logs: Path, say: Say) -> Target:
    """That cluster; refused where the project is installed already."""
    tools = build.kubectl_and_helm(say)
    kubectl = Kubectl(tools / "kubectl", Path(kubeconfig))
    refuse_installed(kubectl)
    image = os.environ.get(BUSYBOX_VARIABLE, "busybox:1.37")
    return Target(kubectl, tools / "helm", image, logs, None)


def refuse_installed(kubectl: Kubectl) -> None:
    """End the run before anything that is not the tests' own could be overwritten or deleted."""
    names = (DEFINITION, f"namespace/{SYSTEM}")
    found = [name for name in names if kubectl.run("get", name, "--ignore-not-found")]
    if found:
        pytest.exit(
            f"{kubectl.kubeconfig}: this cluster has {' and '.join(found)}, which the tests would "
            "overwrite and then delete; take a cluster without, or delete what earlier tests left",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


def images() -> ProjectImages:
    """The project's images, as the cluster's nodes pull them."""
    operator, trainer = _all_set(IMAGE_VARIABLES, "images that the cluster's nodes can pull")
    return ProjectImages(operator, trainer)


def s3() -> Iterator[S3]:
    """A folder of a bucket that is there; the folder is new, and gone afterwards."""
    endpoint, bucket = _all_set(S3_VARIABLES, "a bucket that pods and this machine reach")
    access, secret = _all_set(KEY_VARIABLES, "the bucket's keys")
    keys = Keys(access, secret, os.environ.get("AWS_SESSION_TOKEN"))
    region = os.environ.get("AWS_DEFAULT_REGION", REGION)
    folder = f"tempflow-test-{uuid.uuid4().hex[:8]}"
    store = S3(endpoint.rstrip("/"), bucket, keys, folder, region)
    status, said = store.put("canary", b"canary")
    if status != 200:
        raise ClusterError(
            f"{endpoint} does not let bucket {bucket} be written: {status} {said[:120]!r}"
        )
    yield store
    store.remove_folder()


def _all_set(names: tuple[str, ...], what: str) -> list[str]:
    """The variables' values; without any of them, the test is left out."""
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        pytest.skip(f"needs {what}: set {' and '.join(missing)}")
    return [os.environ[name] for name in names]
