"""The objects of an attempt: a golden file, and the properties that matter whatever the job."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tempflow_api import naming
from tempflow_api.errors import ASKED_TO_STOP, PERMANENT
from tempflow_api.v1alpha1 import TempFlowGRPOJob
from tempflow_operator import desired
from tempflow_operator.desired.quantities import total_bytes
from tempflow_operator.settings import Pods
from tests.builders import UID, JobBuilder, Raw, make_job

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = Pods(image="default:1")


def objects(job: JobBuilder | None = None, *, number: int = 2) -> dict[str, Raw]:
    """By kind."""
    raw = (job or make_job()).build()
    attempt = desired.AttemptOf(
        job=raw["metadata"]["name"],
        namespace=raw["metadata"]["namespace"],
        uid=raw["metadata"]["uid"],
        spec=(job or make_job()).spec_only(),
        number=number,
    )
    return {thing["kind"]: thing for thing in desired.objects(attempt, SETTINGS)}


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


@pytest.mark.parametrize(("name", "job"), [("small", make_job()), ("full", FULL)])
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


class TestEveryObject:
    def test_what_pods_need_comes_before_them(self) -> None:
        assert list(objects()) == ["Service", "ConfigMap", "Job"]

    @pytest.mark.parametrize("kind", ["Service", "ConfigMap", "Job"])
    def test_belongs_to_the_job_and_says_to_which_attempt(self, kind: str) -> None:
        metadata = objects()[kind]["metadata"]
        assert metadata["name"] == "demo-a2"
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
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
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
        assert codes == [sorted(PERMANENT), sorted(ASKED_TO_STOP)]
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
