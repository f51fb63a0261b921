"""The objects of an attempt: a golden file, and the properties that matter whatever the job."""

import importlib
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tempflow_api import naming
from tempflow_api.errors import ASKED_TO_STOP, PERMANENT, ExitCode
from tempflow_api.v1alpha1 import TempFlowGRPOJob
from tempflow_operator import desired
from tempflow_operator.desired.overrides import merged
from tempflow_operator.desired.quantities import total_bytes
from tempflow_operator.settings import GANG_SCHEDULERS, Pods
from tests.builders import UID, JobBuilder, Raw, make_job

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = Pods(image="default:1")


def objects(
    job: JobBuilder | None = None, *, number: int = 2, settings: Pods = SETTINGS
) -> dict[str, Raw]:
    """By kind."""
    raw = (job or make_job()).build()
    attempt = desired.AttemptOf(
        job=raw["metadata"]["name"],
        namespace=raw["metadata"]["namespace"],
        uid=raw["metadata"]["uid"],
        spec=(job or make_job()).spec_only(),
        number=number,
    )
    return {thing["kind"]: thing for thing in desired.objects(attempt, settings)}


def pod(job: JobBuilder | None = None) -> Raw:
    spec: Raw = objects(job)["Job"]["spec"]["template"]["spec"]
    return spec


def container(job: JobBuilder | None = None) -> Raw:
    (only,) = pod(job)["containers"]
    found: Raw = only
    return found


def environment(job: JobBuilder | None = None) -> dict[str, str]:
    return {e["name"]: e["value"] for e in container(job)["env"] if "value" in e}


FULL = (
    make_job()
    .nodes(4)
    .spec("compute.device", "cuda")
    .spec("compute.processesPerNode", 8)
    .spec("compute.cpu", "16")
    .spec("compute.memory", "200Gi")
    .spec("compute.sharedMemory", "32Gi")
    .spec("compute.secretName", "s3-credentials")
    .spec("runPolicy.terminationGracePeriodSeconds", 300)
)


ASKING = (
    make_job()
    .nodes(2)
    .spec("compute.gpuResource", "nvidia.com/mig-1g.10gb")
    .spec("compute.gpusPerProcess", 2)
    .spec("compute.extendedResources", {"rdma/ib": 8})
    .spec("compute.network", {"preset": "ib", "interface": "eth1", "policy": True})
    .spec("checkpoint.endpointUrl", "http://store:8333")
    .spec("modelCache.persistentVolumeClaim", "models")
    .spec("runPolicy.queue", "research")
    .spec(
        "compute.podTemplate",
        {
            "labels": {"team": "vision"},
            "annotations": {"example.com/note": "x"},
            "nodeSelector": {"gpu": "h100"},
            "nodeRequirements": [
                {"key": "zone", "operator": "NotIn", "values": ["b"]},
                {"key": "fast", "operator": "Exists"},
            ],
            "sameDomain": "example.com/rack",
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "priorityClassName": "research",
            "serviceAccountName": "store-reader",
            "runtimeClassName": "nvidia",
            "imagePullSecrets": ["registry"],
            "env": [
                {"name": "NCCL_DEBUG", "value": "INFO"},
                {"name": "HF_HUB_OFFLINE", "value": "1"},
            ],
            "volumes": [
                {"name": "job", "mountPath": "/data", "persistentVolumeClaim": "prompts"},
                {"name": "ca", "mountPath": "/etc/ca", "configMap": "ca"},
                {"name": "key", "mountPath": "/etc/key", "secret": "key"},
                {"name": "big", "mountPath": "/big", "emptyDir": "9Gi", "readOnly": False},
            ],
        },
    )
)


@pytest.mark.parametrize(
    ("name", "job"), [("small", make_job()), ("full", FULL), ("asking", ASKING)]
)
def test_golden(name: str, job: JobBuilder) -> None:
    """After an intended change, delete the file and run the test: it is written anew."""
    file = GOLDEN / f"{name}.yaml"
    text = yaml.safe_dump_all(objects(job).values(), sort_keys=False, width=100)
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert list(yaml.safe_load_all(file.read_text())) == list(objects(job).values())


def test_prompts_of_a_config_map_are_a_file_to_the_trainer() -> None:
    job = (
        make_job()
        .spec("data.prompts", None)
        .spec("data.promptsFile", "prompts.jsonl")
        .spec("data.promptsConfigMap", "demo-prompts")
    )
    made = json.loads(objects(job)["ConfigMap"]["data"]["job.json"])
    seen_by_trainer = TempFlowGRPOJob.model_validate(made).spec.data
    assert seen_by_trainer.prompts_config_map is None
    folder, _, key = str(seen_by_trainer.prompts_file).rpartition("/")
    assert key == "prompts.jsonl"
    (mount,) = [m for m in container(job)["volumeMounts"] if m["mountPath"] == folder]
    (volume,) = [v for v in pod(job)["volumes"] if v["name"] == mount["name"]]
    assert volume["configMap"] == {"name": "demo-prompts"}


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
@pytest.mark.parametrize("job", [make_job(), FULL, ASKING], ids=["small", "full", "asking"])
def test_objects_fit_kubernetes_own_schemas(job: JobBuilder, version: str) -> None:
    checker = importlib.import_module("kubernetes_validate")
    for thing in objects(job).values():
        checker.validate(thing, version, strict=True)


class TestEveryObject:
    def test_the_receipt_comes_last(self) -> None:
        assert list(objects()) == ["Service", "Job", "ConfigMap"]

    @pytest.mark.parametrize("kind", ["Service", "ConfigMap", "Job"])
    def test_belongs_to_the_job_and_says_to_which_attempt(self, kind: str) -> None:
        metadata = objects()[kind]["metadata"]
        assert metadata["name"] == ("demo-a2-11111111" if kind == "ConfigMap" else "demo-a2")
        (owner,) = metadata["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (UID, True, True)
        assert metadata["labels"][naming.LABEL_JOB_NAME] == "demo"
        assert metadata["labels"][naming.LABEL_ATTEMPT] == "2"
        for key in ("name", "instance", "component", "part-of", "managed-by"):
            assert metadata["labels"][f"app.kubernetes.io/{key}"]

    def test_labels_are_valid_for_the_longest_name(self) -> None:
        for thing in objects(make_job("d" * 45), number=1234567).values():
            assert all(len(value) <= 63 for value in thing["metadata"]["labels"].values())
            assert len(thing["metadata"]["name"]) <= 63

    def test_no_field_that_a_queue_owns(self) -> None:
        assert "suspend" not in objects()["Job"]["spec"]


class TestRendezvous:
    def test_rank_zero_is_found_by_name(self) -> None:
        service, job = objects()["Service"], objects()["Job"]
        template = job["spec"]["template"]
        host = f"{job['metadata']['name']}-0.{template['spec']['subdomain']}.team.svc"
        assert environment()[naming.ENV_MASTER_ADDR] == host
        assert service["metadata"]["name"] == template["spec"]["subdomain"]
        labels = template["metadata"]["labels"] | {naming.POD_INDEX: "0"}  # rank 0's
        assert service["spec"]["selector"].items() <= labels.items()
        assert service["spec"]["selector"][naming.POD_INDEX] == "0"
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True

    def test_the_environment(self) -> None:
        assert environment() == {
            "TEMPFLOW_JOB_FILE": "/etc/tempflow/job.json",
            "TEMPFLOW_ATTEMPT": "2",
            "TEMPFLOW_MASTER_ADDR": "demo-a2-0.demo-a2.team.svc",
            "TEMPFLOW_MASTER_PORT": "29500",
            "TEMPFLOW_PROGRESS_PORT": "8080",
            "TEMPFLOW_WORK_DIR": "/var/tempflow",
            "TEMPFLOW_RUN_ID": "team/demo-11111111",
            "HOME": "/home/tempflow",
            "USER": "tempflow",
        }
        (rank,) = [e for e in container()["env"] if e["name"] == naming.ENV_NODE_RANK]
        path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        assert rank["valueFrom"] == {"fieldRef": {"fieldPath": path}}

    def test_the_job_is_what_the_trainer_reads(self) -> None:
        config = objects(FULL)["ConfigMap"]
        read = TempFlowGRPOJob.model_validate_json(config["data"]["job.json"])
        assert read.spec == FULL.spec_only()
        assert (read.metadata.name, read.metadata.namespace) == ("demo", "team")
        assert config["immutable"] is True
        assert "status" not in json.loads(config["data"]["job.json"])


class TestGang:
    def test_any_failure_is_the_gangs(self) -> None:
        spec = objects(FULL)["Job"]["spec"]
        assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == (
            "Indexed", 4, 4,
        )  # fmt: skip
        assert spec["backoffLimit"] == 0
        assert spec["podReplacementPolicy"] == "Failed"
        assert pod()["restartPolicy"] == "Never"  # a pod failure policy demands it

    def test_the_failure_policy_knows_every_class(self) -> None:
        rules = objects()["Job"]["spec"]["podFailurePolicy"]["rules"]
        assert {rule["action"] for rule in rules} == {"FailJob"}
        codes = [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule]
        assert codes == [sorted([*PERMANENT, ExitCode.PREFLIGHT]), sorted(ASKED_TO_STOP)]
        assert 0 not in codes[0] + codes[1]  # the API server refuses it
        assert rules[1]["onPodConditions"][0]["type"] == "DisruptionTarget"

    def test_pods_leave_a_dead_node_soon_and_prefer_one_each(self) -> None:
        assert {t["tolerationSeconds"] for t in pod()["tolerations"]} == {60}
        (spread,) = pod()["topologySpreadConstraints"]
        assert spread["whenUnsatisfiable"] == "ScheduleAnyway"

    def test_the_grace_period_is_the_jobs(self) -> None:
        assert pod(FULL)["terminationGracePeriodSeconds"] == 300


class TestContainer:
    def test_runs_the_launcher_of_the_jobs_image(self) -> None:
        assert container()["command"] == ["python", "-m", "tempflow_trainer.launch"]
        assert container()["image"] == "trainer:1"
        assert container(make_job().spec("compute.image", None))["image"] == "default:1"

    def test_gpus_follow_the_processes(self) -> None:
        resources = container(FULL)["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == "8"
        assert resources["requests"]["nvidia.com/gpu"] == "8"
        assert "nvidia.com/gpu" not in container()["resources"]["limits"]

    def test_shared_memory_counts(self) -> None:
        resources = container(FULL)["resources"]
        assert resources["requests"]["memory"] == "200Gi"
        assert int(resources["limits"]["memory"]) == 232 * 2**30
        (shm,) = [volume for volume in pod(FULL)["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}

    def test_credentials_come_by_the_secrets_name_only(self) -> None:
        assert container(FULL)["envFrom"] == [{"secretRef": {"name": "s3-credentials"}}]
        assert "envFrom" not in container()


@pytest.mark.parametrize("job", [make_job(), FULL])
def test_meets_the_restricted_profile(job: JobBuilder) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    spec, only = pod(job), container(job)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] != 0
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert only["securityContext"]["allowPrivilegeEscalation"] is False
    assert only["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    allowed = {"configMap", "emptyDir"}
    assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"])
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert all("hostPort" not in port for port in only["ports"])
    # Beyond the profile.
    assert only["securityContext"]["readOnlyRootFilesystem"] is True
    assert spec["automountServiceAccountToken"] is False


def test_what_is_written_to_is_a_volume() -> None:
    mounts = {m["mountPath"] for m in container()["volumeMounts"] if not m.get("readOnly")}
    assert {environment()["HOME"], environment()["TEMPFLOW_WORK_DIR"], "/tmp", "/dev/shm"} == mounts


class TestQuantities:
    @pytest.mark.parametrize(
        ("given_", "expected"),
        [
            (("1Ki", "1k"), 2024), (("1.5Gi",), 1610612736), (("1",), 1), (("1m",), 1),
            (("999m", "1m"), 1), (("1M", "1Mi"), 2048576), ((), 0),
        ],
    )  # fmt: skip
    def test_sum(self, given_: tuple[str, ...], expected: int) -> None:
        assert total_bytes(*given_) == expected

    @pytest.mark.parametrize("text", ["", "x", "-1", "1Zi", "1 Gi"])
    def test_nonsense(self, text: str) -> None:
        with pytest.raises(ValueError, match="expected for instance"):
            total_bytes(text)

    @given(st.integers(0, 10**6), st.sampled_from(["", "k", "Mi", "Gi"]))
    def test_a_limit_is_never_below_its_request(self, number: int, unit: str) -> None:
        assert total_bytes(f"{number}{unit}", "64Mi") == total_bytes(f"{number}{unit}") + 2**26


@pytest.mark.parametrize("scheduler", [name for name in GANG_SCHEDULERS if name])
def test_golden_of_gang_schedulers(scheduler: str) -> None:
    found = objects(make_job().nodes(2), settings=Pods(image="default:1", gang_scheduler=scheduler))
    template = found["Job"]["spec"]["template"]
    told = {
        "group": found["PodGroup"],
        "metadata": template["metadata"],
        "schedulerName": template["spec"]["schedulerName"],
    }
    file = GOLDEN / f"gang-{scheduler}.yaml"
    if not file.exists():
        file.write_text(yaml.safe_dump(told, sort_keys=False))
    assert yaml.safe_load(file.read_text()) == told
    assert list(found).index("PodGroup") < list(found).index("Job")


class TestWhatAJobAsksOfItsPods:
    def test_nothing_is_asked_by_default(self) -> None:
        """A job without any of it has the pods that it always had."""
        assert "NetworkPolicy" not in objects()
        assert not {"nodeSelector", "affinity", "schedulerName", "priorityClassName"} & set(pod())
        assert not [name for name in environment() if name.startswith(("NCCL", "HF_"))]
        assert "suspend" not in objects()["Job"]["spec"]

    def test_what_the_operator_needs_stays(self) -> None:
        plain, asking = objects(make_job().nodes(2)), objects(ASKING)
        before, after = (o["Job"]["spec"]["template"] for o in (plain, asking))
        assert before["metadata"]["labels"].items() <= after["metadata"]["labels"].items()
        for list_, key in (("volumes", "name"), ("tolerations", "key")):
            kept = {entry[key]: entry for entry in after["spec"][list_]}
            assert all(kept[entry[key]] == entry for entry in before["spec"][list_])
        assert {m["mountPath"] for m in container()["volumeMounts"]} < {
            m["mountPath"] for m in container(ASKING)["volumeMounts"]
        }
        assert environment().items() <= environment(ASKING).items()
        assert pod(ASKING)["automountServiceAccountToken"] is False

    def test_a_variable_of_the_job_overrides_the_presets(self) -> None:
        names = [entry["name"] for entry in container(ASKING)["env"]]
        assert names.count("NCCL_DEBUG") == 1
        assert environment(ASKING)["NCCL_DEBUG"] == "INFO"

    @pytest.mark.parametrize(
        ("device", "fields", "expected"),
        [
            ("cuda", {}, {"nvidia.com/gpu": "2"}),
            ("cpu", {}, {}),
            ("cpu", {"gpusPerProcess": 1}, {"nvidia.com/gpu": "2"}),
            (
                "cuda",
                {
                    "gpuResource": "amd.com/gpu",
                    "gpusPerProcess": 2,
                    "extendedResources": {"a/b": 3},
                },
                {"amd.com/gpu": "4", "a/b": "3"},
            ),
        ],
    )
    def test_devices(
        self, device: str, fields: dict[str, object], expected: dict[str, str]
    ) -> None:
        job = make_job().spec("compute.device", device).spec("compute.processesPerNode", 2)
        for name, value in fields.items():
            job.spec(f"compute.{name}", value)
        resources = container(job)["resources"]
        assert resources["limits"] == resources["requests"] == expected

    @pytest.mark.parametrize(
        ("network", "expected"),
        [
            ({}, {}),
            ({"preset": "tcp"}, {"NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"}),
            ({"preset": "ib"}, {"NCCL_NET": "IB"}),
            ({"preset": "efa"}, {"FI_PROVIDER": "efa"}),
            ({"interface": "eth0,eth1"}, {"NCCL_SOCKET_IFNAME": "eth0,eth1"}),
            ({"interface": "eth0,eth1"}, {"GLOO_SOCKET_IFNAME": "eth0"}),
        ],
    )
    def test_network(self, network: dict[str, object], expected: dict[str, str]) -> None:
        assert expected.items() <= environment(make_job().spec("compute.network", network)).items()

    def test_an_excluded_interface_says_nothing_to_gloo(self) -> None:
        job = make_job().spec("compute.network", {"interface": "^lo"})
        assert "GLOO_SOCKET_IFNAME" not in environment(job)

    @pytest.mark.parametrize(
        ("endpoint", "ports"),
        [
            (None, [443]),
            ("https://store", [443]),
            ("http://store", [80, 443]),
            ("http://store:8333", [443, 8333]),
        ],
    )
    def test_the_policy_lets_the_store_be_reached(
        self, endpoint: str | None, ports: list[int]
    ) -> None:
        job = make_job().spec("compute.network", {"policy": True})
        policy = objects(job.spec("checkpoint.endpointUrl", endpoint))["NetworkPolicy"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= (
            objects(job)["Job"]["spec"]["template"]["metadata"]["labels"].items()
        )
        allowed = [rule["ports"] for rule in policy["spec"]["egress"] if "to" not in rule]
        assert [entry["port"] for entry in allowed[1]] == ports

    def test_a_policy_lets_the_ranks_ask_rewards_that_are_served_elsewhere(self) -> None:
        served = {"endpoints": ["http://scorer:8090", "http://other/v1", "https://third"]}
        asked = {"endpoints": "http://llm:8000/v1, https://llm:none, http://[", "question": "a, b"}
        rewards = [
            {"name": "pickscore", "service": served},
            {"name": "unified-reward", "parameters": asked},
        ]
        job = make_job().spec("compute.network", {"policy": True}).spec("rewards", rewards)
        egress = objects(job)["NetworkPolicy"]["spec"]["egress"]
        assert [entry["port"] for entry in egress[2]["ports"]] == [80, 443, 8000, 8090]
        proxy = {"env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]}
        behind = job.spec("compute.podTemplate", proxy)
        egress = objects(behind)["NetworkPolicy"]["spec"]["egress"]
        assert 3128 in [entry["port"] for entry in egress[2]["ports"]]

    @pytest.mark.parametrize(
        ("cache", "volume"),
        [
            ({"hostPath": "/cache"}, {"hostPath": {"path": "/cache", "type": "Directory"}}),
            ({"emptyDir": "9Gi"}, {"emptyDir": {"sizeLimit": "9Gi"}}),
            ({"persistentVolumeClaim": "m"}, {"persistentVolumeClaim": {"claimName": "m"}}),
        ],
    )
    def test_the_model_cache(self, cache: dict[str, str], volume: Raw) -> None:
        job = make_job().spec("modelCache", cache)
        assert {"name": "models", **volume} in pod(job)["volumes"]
        (mount,) = [m for m in container(job)["volumeMounts"] if m["name"] == "models"]
        assert mount["mountPath"] == environment(job)[naming.ENV_MODEL_CACHE]
        assert environment(job)["HF_HOME"].startswith(f"{mount['mountPath']}/")
        assert naming.ENV_MODEL_CACHE not in environment()

    def test_a_queue_admits_the_job(self) -> None:
        job = objects(make_job().spec("runPolicy.queue", "research"))["Job"]
        assert job["spec"]["suspend"] is True
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
        codes = [rule.get("onExitCodes") for rule in job["spec"]["podFailurePolicy"]["rules"]]
        assert len(codes) == 2  # being asked to stop by the queue fails nothing


Tree = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


class TestMerge:
    @given(Tree)
    def test_with_itself_or_nothing_changes_nothing(self, tree: object) -> None:
        assert merged(tree, tree) == tree
        if isinstance(tree, dict):
            assert merged(tree, {}) == merged({}, tree) == tree

    @given(Tree, Tree)
    def test_the_patch_is_in_the_result(self, base: object, patch: object) -> None:
        result = merged(base, patch)
        assert merged(result, patch) == result

    def test_lists_go_by_name(self) -> None:
        base = {"env": [{"name": "a", "value": "1"}, {"name": "b", "value": "2"}]}
        patch = {"env": [{"name": "b", "value": "3"}, {"name": "c", "value": "4"}]}
        values = {e["name"]: e["value"] for e in merged(base, patch)["env"]}
        assert values == {"a": "1", "b": "3", "c": "4"}
        assert merged({"args": [1]}, {"args": [2]}) == {"args": [1, 2]}
