"""The chart's admission policy, as a real API server applies it to jobs."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tempflow_api import naming
from tests.builders import make_job
from tests.cluster.bare import Bare
from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import Kubectl
from tests.cluster.waiting import wait_for
from tests.helm import CHART, find_helm

pytestmark = pytest.mark.cluster

POLICED = "policed"
ALL_ON = str(CHART / "ci" / "all-on-values.yaml")
SOUND = {"runPolicy.queue": "gold", "compute.image": "tempflow-trainer:0.1.0"}


@pytest.fixture(scope="module")
def policed(bare_server: Bare) -> Iterator[Kubectl]:
    """With the policy of the values file that has all on, in one namespace."""
    admin = bare_server.kubectl
    rendered = find_helm().objects("--values", ALL_ON, "--set", f"watch.namespaces={{{POLICED}}}")
    policy = [one for one in rendered if "AdmissionPolicy" in one["kind"]]
    assert len(policy) == 2
    admin.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": POLICED}})
    old = {"compute.image": "other:1", "runPolicy.suspend": True}
    admin.run("create", "-f", "-", stdin=manifest("old", old))
    admin.apply(*policy)
    wait_for("the policy", lambda: said(admin, {"runPolicy.queue": None}), deadline_seconds=60)
    yield admin
    for one in reversed(policy):
        admin.run("delete", one["kind"], one["metadata"]["name"])
    admin.run("delete", naming.PLURAL, "old", "-n", POLICED)


def manifest(name: str, fields: dict[str, Any], namespace: str = POLICED) -> str:
    """A job with these fields of its spec; None leaves one out."""
    job = make_job(name)
    for path, value in fields.items():
        job = job.spec(path, value)
    raw = job.build()
    metadata = {"name": name, "namespace": namespace}
    return json.dumps(
        {**{key: raw[key] for key in ("apiVersion", "kind", "spec")}, "metadata": metadata}
    )


def said(admin: Kubectl, fields: dict[str, Any], namespace: str = POLICED) -> str:
    """What the API server says against a job with these fields; empty when it takes it."""
    body = manifest("bounded", {**SOUND, **fields}, namespace)
    try:
        admin.run("create", "--dry-run=server", "-f", "-", stdin=body)
    except ClusterError as error:
        return str(error)
    return ""


SERVED = {"name": "digit", "placement": "service"}
SERVERS = {"reward": "digit", "replicas": 9, "device": "cuda"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ""),
        ({"compute.image": None}, ""),
        ({"compute.image": "tempflow-trainer/mine:1"}, ""),
        ({"compute.image": "tempflow-trainer:0.1.1"}, "have to be among tempflow-trainer/, tem"),
        ({"compute.image": "tempflow-trainers/mine:1"}, "some image is not allowed"),
        ({"runPolicy.queue": None}, "spec.runPolicy.queue is missing"),
        ({"compute.gpusPerProcess": 16}, ""),
        ({"compute.gpusPerProcess": 17}, "asks for 17 GPUs, and 16 are allowed"),
        (
            {"compute.extendedResources": {"amd.com/gpu": 9}, "compute.gpusPerProcess": 8},
            "asks for 17 GPUs, and 16 are allowed",
        ),
        (
            {"rewards": [SERVED], "compute.rewardPods": [SERVERS], "compute.gpusPerProcess": 8},
            "asks for 17 GPUs, and 16 are allowed",
        ),
        (
            {"rewards": [SERVED], "compute.rewardPods": [{**SERVERS, "image": "other:1"}]},
            "of tempflow-trainer:0.1.0, other:1 some image is not allowed",
        ),
    ],
)
def test_a_job_is_bounded(policed: Kubectl, fields: dict[str, Any], words: str) -> None:
    told = said(policed, fields)
    assert words in told
    assert bool(words) == bool(told), told


def test_another_namespace_is_not(policed: Kubectl) -> None:
    assert said(policed, {"runPolicy.queue": None}, namespace="default") == ""


def test_a_job_from_before_can_be_stopped_and_not_widened(policed: Kubectl) -> None:
    def patched(spec: dict[str, Any]) -> str:
        change = ("--type=merge", "--dry-run=server", "-p", json.dumps({"spec": spec}))
        return policed.run("patch", naming.PLURAL, "old", "-n", POLICED, *change)

    patched({"runPolicy": {"cancel": True}})
    with pytest.raises(ClusterError, match="some image is not allowed"):
        patched({"compute": {"image": "other:2"}})
