"""What the operator's tests do and look at: an installed chart, a user, and the user's jobs."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tempflow_api import checkpoint_layout as layout
from tempflow_api import naming
from tempflow_api.conditions import ConditionType, Reason, find
from tempflow_api.status import Condition, JobStatus
from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import JsonObject, Kubectl
from tests.cluster.project_images import ROOT, ProjectImages
from tests.cluster.s3 import S3
from tests.cluster.target import Target
from tests.cluster.waiting import wait_for

RELEASE = "tempflow"
SYSTEM = "tempflow-system"
OPERATOR_USER = f"system:serviceaccount:{SYSTEM}:{RELEASE}"
DEFINITION = f"customresourcedefinition/{naming.PLURAL}.{naming.GROUP}"
SECRET = "s3-credentials"
RUNS = "runs"  # the folder of all jobs but the journey's
_POD_INDEX = "batch.kubernetes.io/job-completion-index"
# Only torchrun's children have a rank.
_PIDS = """
import glob
from pathlib import Path
pids = [
    int(Path(file).parent.name) for file in glob.glob("/proc/[0-9]*/environ")
    if b"RANK={rank}" in Path(file).read_bytes().split(bytes(1))
]
"""

EPOCHS = 18
COMMIT_EVERY = 3
# Instead of 120: a test waits for all of it.
LOST_NODE_SECONDS = 10
IMPATIENT = (
    *("--set", "extraEnv[0].name=TEMPFLOW_LOST_NODE_SECONDS"),
    *("--set-string", f"extraEnv[0].value={LOST_NODE_SECONDS}"),
)
SMALL = {
    "spec.algorithm.epochs": EPOCHS,
    "spec.algorithm.seedsPerPrompt": 1,
    "spec.checkpoint.everyEpochs": COMMIT_EVERY,
    "spec.evaluation.everyEpochs": 100,
    "spec.evaluation.steps": 4,
    "spec.evaluation.prompts": 10,
    "spec.evaluation.imagesPerPrompt": 4,
    # Learns visibly in so few epochs.
    "spec.optimizer.learningRate": 0.01,
    # Nothing enforces it on the test cluster; it is one more object of every attempt.
    "spec.compute.network.policy": "true",
}


@dataclass(frozen=True)
class Release:
    """The chart, installed with the project's own images and otherwise its defaults."""

    cluster: Target

    def install(self, images: ProjectImages, *more: str) -> None:
        """Install it, or upgrade what is installed; with further options of helm's."""
        self._helm(
            *("upgrade", "--install", RELEASE, str(ROOT / "charts/tempflow")),
            *("--namespace", SYSTEM, "--create-namespace"),
            *images.chart_values(),
            *more,
        )
        self._rolled_out()

    def roll_back(self) -> None:
        """To the revision before."""
        self._helm("rollback", RELEASE, "--namespace", SYSTEM)
        self._rolled_out()

    def revision(self) -> int:
        listed = json.loads(self._helm("list", "--namespace", SYSTEM, "-o", "json"))
        return int(next(one["revision"] for one in listed if one["name"] == RELEASE))

    def log_level(self) -> str:
        """With which the operator's pods run."""
        deployment = self.cluster.kubectl.get("deployment", RELEASE, namespace=SYSTEM)
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        found = {one["name"]: one.get("value", "") for one in container["env"]}
        return str(found["TEMPFLOW_LOG_LEVEL"])

    def _rolled_out(self) -> None:
        self.cluster.kubectl.run(
            *(
                "rollout",
                "status",
                f"deployment/{RELEASE}",
                "--namespace",
                SYSTEM,
                "--timeout",
                "2m",
            )
        )

    def test(self) -> str:
        return self._helm("test", RELEASE, "--namespace", SYSTEM, "--logs")

    def uninstall_chart(self) -> None:
        self._helm("uninstall", RELEASE, "--namespace", SYSTEM, "--wait", "--ignore-not-found")

    def uninstall(self) -> None:
        self.uninstall_chart()
        self.cluster.kubectl.run("delete", DEFINITION, "--ignore-not-found")
        # Waited for: a cluster that is not ours is refused while it has this namespace.
        self.cluster.kubectl.run(
            *("delete", "namespace", SYSTEM, "--ignore-not-found", "--timeout=2m")
        )

    def leader(self) -> str:
        """The pod that holds the Lease; empty when none does."""
        lease = self.cluster.kubectl.get("lease", RELEASE, namespace=SYSTEM)
        return str(lease.get("spec", {}).get("holderIdentity") or "")

    def pods(self) -> list[JsonObject]:
        selector = "app.kubernetes.io/component=operator"
        return self.cluster.kubectl.items("pods", "-l", selector, namespace=SYSTEM)

    def kill(self, pod: str) -> None:
        """End an operator's process at once and for good, as a lost machine would.

        On nodes that are not ours its kubelet asks it to end, and it gives its Lease up.
        """
        if self.cluster.own is not None:
            for process in processes_with("POD_NAME", pod):
                process.kill()
        # Or its kubelet would start it again, under the name that holds the Lease.
        self.cluster.kubectl.run(
            *("delete", "pod", pod, "-n", SYSTEM, "--force", "--grace-period=0", "--wait=false")
        )

    def save_logs(self, folder: Path) -> None:
        """Keep what the operator wrote, for when a test has failed."""
        for pod in self.pods():
            name = pod["metadata"]["name"]
            text = self.cluster.kubectl.run("logs", name, "-n", SYSTEM)
            (folder / f"operator-{name}.log").write_text(text)

    def _helm(self, *arguments: str) -> str:
        return _run([str(self.cluster.helm), *arguments], self.cluster.kubectl.environment())


@dataclass(frozen=True)
class Submission:
    """A job as its user sees it, through a kubeconfig that can do nothing but that."""

    user: Kubectl
    namespace: str
    name: str

    def status(self) -> JobStatus:
        return JobStatus.model_validate(self.raw().get("status", {}))

    def raw(self) -> JsonObject:
        return self.user.get(naming.PLURAL, self.name, namespace=self.namespace)

    def run_id(self) -> str:
        return naming.run_folder(self.namespace, self.name, self.raw()["metadata"]["uid"])

    def condition(self, kind: ConditionType) -> Condition:
        condition = find(self.status().conditions, kind)
        if condition is None:
            raise ClusterError(f"{self.name} has no condition {kind}")
        return condition

    def wait(self, kind: ConditionType, *, deadline_seconds: float) -> None:
        """Until the condition is True; the job's whole status is told when the deadline is over."""
        try:
            self.user.run(
                *("wait", f"{naming.PLURAL}/{self.name}", "-n", self.namespace),
                *(f"--for=condition={kind}", f"--timeout={deadline_seconds:.0f}s"),
            )
        except ClusterError as error:
            raise ClusterError(f"{error}\n{yaml.safe_dump(self.raw().get('status'))}") from error

    def wait_reason(
        self, kind: ConditionType, reason: Reason, *, deadline_seconds: float
    ) -> Condition:
        """The condition, once it has that reason."""

        def there() -> Condition | None:
            condition = find(self.status().conditions, kind)
            return condition if condition is not None and condition.reason == reason else None

        return wait_for(
            f"{self.name} with {kind} for {reason}", there, deadline_seconds=deadline_seconds
        )

    def patch(self, change: str) -> None:
        self.user.run(
            *("patch", naming.PLURAL, self.name, "-n", self.namespace, "--type=merge", "-p", change)
        )

    def delete(self) -> None:
        """Delete it with its pods."""
        self.user.run(
            *("delete", naming.PLURAL, self.name, "-n", self.namespace, "--ignore-not-found"),
            *("--cascade=foreground", "--timeout=3m"),
        )

    def is_gone(self) -> bool:
        return not self.user.items(
            naming.PLURAL, f"--field-selector=metadata.name={self.name}", namespace=self.namespace
        )

    def pods(self) -> list[JsonObject]:
        selector = f"{naming.LABEL_JOB_NAME}={self.name}"
        return self.user.items("pods", "-l", selector, namespace=self.namespace)

    def live_pods(self) -> list[str]:
        """Names of the pods that hold anything."""
        return [
            pod["metadata"]["name"]
            for pod in self.pods()
            if pod["status"]["phase"] not in ("Succeeded", "Failed")
        ]

    def pod_of_rank(self, rank: int) -> str:
        """The live pod of that rank, where each has one."""
        selector = f"{naming.LABEL_JOB_NAME}={self.name},{_POD_INDEX}={rank}"
        found = self.user.items("pods", "-l", selector, namespace=self.namespace)
        (pod,) = {pod["metadata"]["name"] for pod in found} & set(self.live_pods())
        return str(pod)

    def run_beside(self, admin: Kubectl, rank: int, program: str) -> str:
        """Run a Python program in the container of a rank, to which `pids` tells its processes."""
        where = ("exec", self.pod_of_rank(rank), "-n", self.namespace)
        container = ("-c", naming.TRAINER_CONTAINER, "--")
        return admin.run(*where, *container, "python", "-c", _PIDS.format(rank=rank) + program)


@dataclass(frozen=True)
class Store:
    """Checkpoints, looked at from this machine with the tools that a user has."""

    s3: S3

    def uri(self, job: Submission) -> str:
        return self.s3.uri(_path(job))

    def has_committed(self, job: Submission, step: int, incarnation: int = 1) -> bool:
        """Whether that start of attempt 1 has committed the checkpoint after so many epochs."""
        folder = f"{layout.CHECKPOINTS}/{layout.folder_name(step, 1, incarnation)}"
        return self.s3.get(f"{_path(job)}/{folder}/{layout.MANIFEST}")[0] == 200

    def wait_first_commit(self, job: Submission) -> None:
        wait_for(
            f"the first checkpoint of {job.name}",
            lambda: self.has_committed(job, COMMIT_EVERY),
            deadline_seconds=300,
        )

    def evaluations(self, job: Submission) -> list[JsonObject]:
        """What the run's record says of each evaluation."""
        status, body = self.s3.get(f"{_path(job)}/{layout.EVALUATIONS}")
        assert status == 200
        return [json.loads(line) for line in body.decode().splitlines()]

    def list(self, job: Submission) -> str:
        return self._tempflow("checkpoints", "list", self.uri(job), *self._endpoint())

    def pull(self, job: Submission, to: Path) -> Path:
        self._tempflow("pull", self.uri(job), "--to", str(to), *self._endpoint())
        return to

    def adapter_digest(self, job: Submission, folder: Path) -> str:
        """Of the newest checkpoint, which is pulled into that folder."""
        (weights,) = (self.pull(job, folder) / layout.ADAPTER).glob("*.safetensors")
        return hashlib.sha256(weights.read_bytes()).hexdigest()

    def _endpoint(self) -> tuple[str, str]:
        return "--endpoint-url", self.s3.endpoint

    def _tempflow(self, *arguments: str) -> str:
        return tempflow(*arguments, environment=access(self.s3))


def _path(job: Submission) -> str:
    """Of the run, below the store's folder."""
    return f"{RUNS}/{job.run_id()}"


def tempflow(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """The command line, as it is installed for a user."""
    command = [sys.executable, "-m", "tempflow", *arguments]
    return _run(command, {**os.environ, **(environment or {})})


def credentials(s3: S3) -> dict[str, str]:
    """The user's own."""
    keys = s3.keys
    found = {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key}
    return found | ({"AWS_SESSION_TOKEN": keys.session_token} if keys.session_token else {})


def access(s3: S3) -> dict[str, str]:
    """All that reaches the store, for pods and for the user's commands."""
    return {**credentials(s3), "AWS_DEFAULT_REGION": s3.region}


def manifest(name: str, s3: S3, overrides: dict[str, object]) -> str:
    """The digits example as a job of two nodes that is short."""
    values = {
        "metadata.name": name,
        **SMALL,
        "spec.compute.nodes": 2,
        "spec.compute.processesPerNode": 1,
        "spec.compute.secretName": SECRET,
        "spec.checkpoint.uri": s3.uri(RUNS),
        "spec.checkpoint.endpointUrl": s3.endpoint,
        **overrides,
    }
    settings = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    return tempflow("validate", str(ROOT / "examples/digits.yaml"), "-o", "yaml", *settings)


def submit(user: Kubectl, namespace: str, s3: S3, name: str, **overrides: object) -> Submission:
    """Apply the short job, with these fields of its spec set otherwise; `a__b` is `a.b`."""
    changed = {f"spec.{path.replace('__', '.')}": value for path, value in overrides.items()}
    user.run("apply", "-n", namespace, "-f", "-", stdin=manifest(name, s3, changed))
    return Submission(user, namespace, name)


def create_user(admin: Kubectl, namespace: str, s3: S3, folder: Path) -> Kubectl:
    """Somebody who may do in the namespace what the chart's edit role allows, and nothing else.

    The administrator has put the store's credentials there.
    """
    in_namespace = ("-n", namespace)
    admin.run("create", "serviceaccount", "researcher", *in_namespace)
    admin.run(
        *("create", "rolebinding", "researcher", f"--clusterrole={RELEASE}-edit"),
        *(f"--serviceaccount={namespace}:researcher", *in_namespace),
    )
    literals = [f"--from-literal={key}={value}" for key, value in access(s3).items()]
    admin.run("create", "secret", "generic", SECRET, *literals, *in_namespace)
    token = admin.run("create", "token", "researcher", "--duration=2h", *in_namespace).strip()
    config = yaml.safe_load(admin.run("config", "view", "--raw", "--flatten", "--minify"))
    config["users"] = [
        {"name": entry["name"], "user": {"token": token}} for entry in config["users"]
    ]
    kubeconfig = folder / "researcher.kubeconfig"
    kubeconfig.touch(mode=0o600)
    kubeconfig.write_text(yaml.safe_dump(config))
    return Kubectl(admin.binary, kubeconfig)


def processes_with(name: str, value: str) -> list[psutil.Process]:
    """Processes of this machine, containers' too, with that variable in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _run(command: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip())[-1000:]
        raise ClusterError(f"{' '.join(command)[:160]} failed: {last}")
    return done.stdout
