"""The servers of rewards that the operator starts: a golden file, and what holds for all."""

import importlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tempflow_api import naming
from tempflow_operator import desired
from tempflow_operator.settings import Pods
from tempflow_trainer.rewards import serve, wire
from tests.builders import UID, JobBuilder, Raw, make_job

GOLDEN = Path(__file__).parent / "golden" / "served.yaml"

SERVED = (
    make_job()
    .nodes(2)
    .spec(
        "rewards",
        [
            {"name": "digit-ink"},
            {
                "name": "digit",
                "uses": "digit-log-probability",
                "placement": "service",
                "parameters": {"a": "b=c", "home": "$(HOME)"},
                "service": {"tokenVariable": "REWARD_TOKEN"},
            },
            {"name": "plain", "uses": "digit-judge", "weight": 0.0, "placement": "service"},
        ],
    )
    .spec(
        "compute.rewardPods",
        [
            {
                "reward": "digit",
                "replicas": 3,
                "device": "cuda",
                "cpu": "4",
                "memory": "16Gi",
                "image": "judge:2",
            }
        ],
    )
    .spec("compute.secretName", "credentials")
    .spec("compute.network.policy", True)
    .spec("compute.gpuResource", "nvidia.com/mig-1g.10gb")
    .spec("modelCache.persistentVolumeClaim", "models")
    .spec(
        "compute.podTemplate",
        {
            "labels": {"team": "vision"},
            "sameDomain": "example.com/rack",
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "imagePullSecrets": ["registry"],
            "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
            "volumes": [{"name": "ca", "mountPath": "/etc/ca", "configMap": "ca"}],
        },
    )
)


def objects(job: JobBuilder = SERVED, number: int = 2) -> list[Raw]:
    metadata = job.build()["metadata"]
    attempt = desired.AttemptOf(
        job=metadata["name"],
        namespace="team",
        uid=UID,
        spec=job.spec_only(),
        number=number,
    )
    return desired.objects(attempt, Pods(image="default:1"))


def of_kind(kind: str, things: list[Raw]) -> dict[str, Raw]:
    return {thing["metadata"]["name"]: thing for thing in things if thing["kind"] == kind}


def deployment(name: str = "demo-a2-r1") -> Raw:
    return of_kind("Deployment", objects())[name]


def container(name: str = "demo-a2-r1") -> Raw:
    (only,) = deployment(name)["spec"]["template"]["spec"]["containers"]
    found: Raw = only
    return found


def served_by(name: str) -> Any:
    """What the server makes of the container's arguments."""
    return serve._arguments([word.replace("$$", "$") for word in container(name)["args"]])


def test_golden() -> None:
    """After an intended change, delete the file and run the test: it is written anew."""
    things = [thing for thing in objects() if "-r" in thing["metadata"]["name"]]
    if not GOLDEN.exists():
        GOLDEN.write_text(yaml.safe_dump_all(things, sort_keys=False, width=100))
    assert list(yaml.safe_load_all(GOLDEN.read_text())) == things


def test_a_job_without_them_has_none() -> None:
    assert not of_kind("Deployment", objects(make_job()))


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_objects_fit_kubernetes_own_schemas(version: str) -> None:
    checker = importlib.import_module("kubernetes_validate")
    for thing in objects():
        checker.validate(thing, version, strict=True)


def test_they_come_before_the_ranks() -> None:
    kinds = [thing["kind"] for thing in objects()]
    last = len(kinds) - 1 - kinds[::-1].index("Deployment")
    assert last < kinds.index("Job") < kinds.index("ConfigMap") == len(kinds) - 1


def test_the_ranks_are_told_where_and_the_address_is_the_servers() -> None:
    things = objects()
    (job,) = of_kind("Job", things).values()
    (rank,) = job["spec"]["template"]["spec"]["containers"]
    (given,) = [e["value"] for e in rank["env"] if e["name"] == naming.ENV_REWARD_ENDPOINTS]
    told = json.loads(given)
    assert list(told) == ["digit", "plain"]
    for reward, url in told.items():
        address = urlsplit(url)
        name, namespace, _ = str(address.hostname).split(".")
        service = of_kind("Service", things)[name]
        assert (namespace, address.port) == ("team", service["spec"]["ports"][0]["port"])
        template = of_kind("Deployment", things)[name]["spec"]["template"]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        assert service["spec"]["selector"][naming.LABEL_REWARD] == reward
        (port,) = template["spec"]["containers"][0]["ports"]
        assert port["containerPort"] == address.port


def test_the_server_understands_its_arguments() -> None:
    full, plain = served_by("demo-a2-r1"), served_by("demo-a2-r2")
    assert (full.reward, plain.reward) == ("digit-log-probability", "digit-judge")
    assert (full.device, plain.device) == ("cuda", "cpu")
    assert (full.token_variable, plain.token_variable) == ("REWARD_TOKEN", None)
    assert full.set == ["a=b=c", "home=$(HOME)"]
    assert full.host == "0.0.0.0"
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert str(full.cache) in mounts
    (port,) = container()["ports"]
    assert full.port == port["containerPort"]
    grace = deployment()["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert full.drain < grace
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"]["path"] == wire.HEALTH_PATH


def test_what_the_pods_ask_for() -> None:
    assert deployment()["spec"]["replicas"] == 3
    assert container()["resources"] == {
        "requests": {"cpu": "4", "memory": "16Gi", "nvidia.com/mig-1g.10gb": "1"},
        "limits": {"memory": "16Gi", "nvidia.com/mig-1g.10gb": "1"},
    }
    assert deployment("demo-a2-r2")["spec"]["replicas"] == 1
    assert container("demo-a2-r2")["resources"] == {"requests": {}, "limits": {}}
    assert (container()["image"], container("demo-a2-r2")["image"]) == ("judge:2", "trainer:1")


def test_secrets_come_by_name_only() -> None:
    assert container()["envFrom"] == [{"secretRef": {"name": "credentials"}}]


def test_the_pod_template_holds_but_for_the_domain_of_the_ranks() -> None:
    template = deployment()["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "vision"
    assert template["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container()["env"]
    assert "/etc/ca" in {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert "affinity" not in template["spec"]


def test_meets_the_restricted_profile() -> None:
    spec = deployment()["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert spec["automountServiceAccountToken"] is False
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_ranks_selectors_leave_the_servers_out_and_the_policy_takes_them_in() -> None:
    things = objects()
    labels = deployment()["spec"]["template"]["metadata"]["labels"]
    (policy,) = of_kind("NetworkPolicy", things).values()
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    for ingress in policy["spec"]["ingress"]:
        assert ingress["from"], "nobody from outside"
    rendezvous = of_kind("Service", things)["demo-a2"]["spec"]["selector"]
    (job,) = of_kind("Job", things).values()
    ranks = job["spec"]["template"]["spec"]
    near = ranks["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    for selector in (
        rendezvous,
        ranks["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        near[0]["labelSelector"]["matchLabels"],
    ):
        assert not selector.items() <= labels.items()


def test_names_and_labels_are_valid_for_the_longest_names() -> None:
    job = make_job("d" * 45).spec("rewards", [{"name": "r" * 63, "placement": "service"}] * 32)
    for thing in objects(job, number=1_234_567):
        assert len(thing["metadata"]["name"]) <= 63
        assert all(len(value) <= 63 for value in thing["metadata"]["labels"].values())
        (owner,) = thing["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (UID, True)
