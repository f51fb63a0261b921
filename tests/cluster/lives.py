"""Jobs that live on a control plane without nodes: the Job controller is the real one, the test is
the kubelet, and the operator, where it is no process of its own, makes its passes here."""

import time
from typing import Any

from kubernetes.aio.client import ApiClient, Configuration

from tempflow_api import naming
from tempflow_api.status import JobStatus
from tempflow_operator import settings as configuration
from tempflow_operator.cluster import JOBS, PODS, TRAINING_JOBS, ApiError, Cluster
from tempflow_operator.lastwords import Heard
from tempflow_operator.metrics import Metrics
from tempflow_operator.probes import WatchProof
from tempflow_operator.progress import ProgressReader
from tempflow_operator.reconcile import Reconciler
from tests.builders import JobBuilder, Raw
from tests.cluster.bare import Bare

NAMESPACE = "default"
SETTINGS = configuration.Settings(
    timing=configuration.Timing(restart_delay=0.1, disruption_delay=0.1)
)


def connect(server: Bare) -> ApiClient:
    """As an administrator."""
    return _connect(server, server.token)


def connect_operator(server: Bare) -> ApiClient:
    """With the rights that the chart gives the operator."""
    return _connect(server, server.operator_token)


def _connect(server: Bare, token: str) -> ApiClient:
    settings = Configuration()
    settings.host, settings.verify_ssl = server.url, False
    settings.api_key = {"BearerToken": f"Bearer {token}"}
    return ApiClient(settings)


def operator(cluster: Cluster, settings: configuration.Settings = SETTINGS) -> Reconciler:
    """One that has just been started."""
    metrics = Metrics()
    return Reconciler(
        cluster,
        settings,
        progress=ProgressReader(
            settings.progress, clock=time.monotonic, on_change=lambda _: None, metrics=metrics
        ),
        heard=Heard(),
        watches=WatchProof(time.monotonic, by_namespace=False),
        metrics=metrics,
    )


async def submit(admin: Cluster, job: JobBuilder) -> None:
    """Create the job as a user would."""
    raw = job.build()
    body = {key: raw[key] for key in ("apiVersion", "kind", "spec")}
    body["metadata"] = {"name": raw["metadata"]["name"]}
    await admin._send("create", TRAINING_JOBS, NAMESPACE, body=body)


async def status_of(admin: Cluster, name: str) -> JobStatus:
    raw = await admin._send("get", TRAINING_JOBS, NAMESPACE, name=name)
    return JobStatus.model_validate(raw.get("status", {}))


async def pods_of(admin: Cluster, name: str) -> list[Raw]:
    return await admin._list(PODS, NAMESPACE, f"{naming.LABEL_JOB_NAME}={name}")


async def what_lives(admin: Cluster, name: str) -> tuple[list[Raw], set[str]]:
    """Pods of a job that hold anything, and the numbers of the attempts that may still run."""
    jobs = await admin._list(JOBS, NAMESPACE, f"{naming.LABEL_JOB_NAME}={name}")
    living = [pod for pod in await pods_of(admin, name) if phase_of(pod) in ("Pending", "Running")]
    unfinished = [
        job
        for job in jobs
        if not job.get("status", {}).get("conditions")
        and "deletionTimestamp" not in job["metadata"]
    ]
    labels = [thing["metadata"]["labels"] for thing in (*living, *unfinished)]
    return living, {mine[naming.LABEL_ATTEMPT] for mine in labels}


async def bind(admin: Cluster, pod: Raw) -> None:
    """To a node, as the scheduler does: from then on only a kubelet can say that it has ended."""
    name = pod["metadata"]["name"]
    target = {"apiVersion": "v1", "kind": "Node", "name": "node-1"}
    body = {"metadata": {"name": name}, "target": target}
    await admin._send("create", PODS, NAMESPACE, name=name, subresource="binding", body=body)


def phase_of(pod: Raw) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


async def set_pod(admin: Cluster, pod: Raw, phase: str, state: Raw) -> None:
    """What a kubelet reports of a pod and of its container."""
    container = {"name": naming.TRAINER_CONTAINER, "state": state, "restartCount": 0}
    container |= {"image": "trainer:1", "imageID": "", "ready": phase == "Running"}
    body = {"status": {"phase": phase, "containerStatuses": [container]}}
    await patch(admin, PODS, pod["metadata"]["name"], body, subresource="status")


async def patch(
    admin: Cluster, resource: Any, name: str, body: Raw, *, subresource: str = ""
) -> None:
    try:
        await admin._send(
            "patch",
            resource,
            NAMESPACE,
            name=name,
            subresource=subresource,
            body=body,
            content_type="application/merge-patch+json",
        )
    except ApiError as error:
        if error.code not in (404, 409):  # it went, or the Job controller was quicker
            raise
