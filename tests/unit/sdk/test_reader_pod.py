"""The pod that reads a store: like the job's own in all that gives access, and nothing more."""

import json
from pathlib import Path
from typing import Any

import pytest

from tempflow import manifest
from tempflow.cluster import reader_pod
from tempflow.cluster.needs import named
from tempflow_api import naming
from tempflow_api.storage import Checkpoint
from tempflow_api.v1alpha1 import Compute, JobSpec

ROOT = Path(__file__).parents[3]
TEMPLATE = {
    "labels": {"azure.workload.identity/use": "true"},
    "nodeSelector": {"pool": "near-the-store"},
    "nodeRequirements": [{"key": "zone", "operator": "Exists"}],
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "imagePullSecrets": ["registry"],
    "runtimeClassName": "nvidia",
    "env": [{"name": "AWS_CA_BUNDLE", "value": "/ca/ca.crt"}, {"name": "HOME", "value": "/root"}],
    "volumes": [
        {"name": "ca", "mountPath": "/ca", "configMap": "authority"},
        {"name": "data", "mountPath": "/data", "persistentVolumeClaim": "data"},
    ],
}


@pytest.fixture
def job() -> JobSpec:
    kept = {"uri": "s3://bucket/runs", "endpointUrl": "http://store", "region": "r", "keepLast": 9}
    spec = manifest.read(str(ROOT / "examples/digits.yaml")).job.spec
    compute = Compute.model_validate(
        {"device": "cuda", "secretName": "keys", "podTemplate": TEMPLATE}
    )
    return spec.model_copy(
        update={"compute": compute, "checkpoint": Checkpoint.model_validate(kept)}
    )


def test_it_has_what_gives_access_and_no_device(job: JobSpec) -> None:
    pod = reader_pod.manifest(job, job.checkpoint, "image", owner=None)
    made, (container,) = pod["spec"], pod["spec"]["containers"]
    assert pod["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    assert made["nodeSelector"] == {"pool": "near-the-store"}
    assert made["tolerations"] == [{"key": "dedicated", "operator": "Exists"}]
    assert made["imagePullSecrets"] == [{"name": "registry"}]
    assert "nodeAffinity" in made["affinity"]
    assert "runtimeClassName" not in made
    assert [one["name"] for one in made["volumes"]] == ["home", "tmp", "extra-ca"]
    assert {one["mountPath"] for one in container["volumeMounts"]} >= {"/ca"}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert set(container["resources"]["limits"]) == {"cpu", "memory"}
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert variables["AWS_CA_BUNDLE"] == "/ca/ca.crt"
    assert variables["HOME"] != "/root"  # that of the image is not writable
    told = json.loads(variables[naming.ENV_STORE])
    assert told == {"uri": "s3://bucket/runs", "endpointUrl": "http://store", "region": "r"}


def test_it_is_no_pod_of_an_attempt(job: JobSpec) -> None:
    """Or an operator would count it, and its log would be the job's."""
    owner = {"metadata": {"name": "j", "uid": "u", "namespace": "n"}}
    metadata = reader_pod.manifest(job, job.checkpoint, "image", owner)["metadata"]
    assert naming.LABEL_JOB_UID not in metadata["labels"]
    (reference,) = metadata["ownerReferences"]
    assert (reference["name"], reference["uid"]) == ("j", "u")
    assert not {"controller", "blockOwnerDeletion"} & set(reference)


def pod(phase: str = "Pending", state: dict[str, Any] | None = None, **status: Any) -> Any:
    of_container = [{"image": "image", "state": state}] if state else []
    return {
        "metadata": {},
        "status": {"phase": phase, "containerStatuses": of_container, **status},
    }


UNSCHEDULABLE = [{"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available"}]
TERMINATED = {"terminated": {"exitCode": 2, "message": "Traceback\nlast line"}}


@pytest.mark.parametrize(
    ("given", "waits", "refused", "ended"),
    [
        (pod(), "it is not scheduled yet", "", ""),
        (pod(conditions=UNSCHEDULABLE), "no node takes it: 0/2 nodes are available", "", ""),
        (pod(state={"waiting": {"reason": "ContainerCreating"}}), "ContainerCreating", "", ""),
        (pod(state={"waiting": {"reason": "ErrImagePull"}}), "", "image image cannot be", ""),
        (pod("Failed", TERMINATED), "", "", "exit code 2: last line"),
        (pod("Failed", reason="DeadlineExceeded"), "", "", "DeadlineExceeded"),
        (pod("Running", {"running": {}}), "", "", ""),
    ],
)
def test_what_is_said_of_it(given: Any, waits: str, refused: str, ended: str) -> None:
    assert waits in reader_pod.waits_for(given)
    assert bool(refused) == bool(reader_pod.refused(given))
    assert refused in reader_pod.refused(given)
    assert reader_pod.ended(given) == ended


def test_a_manifest_names_its_objects_with_their_fields(job: JobSpec) -> None:
    found = {(one.word, one.name) for one in named(job, "n")}
    assert found == {
        ("RuntimeClass", "nvidia"),
        ("Secret", "registry"),
        ("Secret", "keys"),
        ("ConfigMap", "authority"),
        ("PersistentVolumeClaim", "data"),
    }
