"""What keeps jobs from running on a cluster, each fault with its remedy.

Every check asks the API server with the caller's own rights. What these do not suffice to see is
``unknown``, never ``ok``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Literal

from tempflow.cluster import needs, reader_pod
from tempflow.cluster.connection import JOBS, PODS, Connection, Raw
from tempflow.cluster.errors import ClusterError, Forbidden, NotFound
from tempflow.cluster.reader import reader
from tempflow.cluster.watching import every
from tempflow_api import naming
from tempflow_api.crd import spec_schema
from tempflow_api.errors import StoreUnavailable
from tempflow_api.v1alpha1 import Compute, TempFlowGRPOJob

State = Literal["ok", "warning", "fault", "unknown"]

OLDEST_KUBERNETES = (1, 31)
# An operator sees a new job within seconds.
_UNSEEN_SECONDS = 60.0
_GPU = "nvidia.com/gpu"
_KUEUE = "kueue.x-k8s.io"
_OPERATOR = "app.kubernetes.io/name=tempflow,app.kubernetes.io/component=operator"
_INSIDE = "storage inside"
_PROBE_SECONDS = 60.0

# What the verbs of the command line ask for: group, resource, verbs.
NEEDED_RIGHTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (naming.GROUP, naming.PLURAL, ("get", "list", "watch", "create", "patch", "delete")),
    ("", "pods", ("get", "list")),
    ("", "pods/log", ("get",)),
    ("", "configmaps", ("create", "patch", "delete")),
    ("events.k8s.io", "events", ("list", "watch")),
)


@dataclass(frozen=True)
class Finding:
    """What one check came to."""

    check: str
    state: State
    found: str
    remedy: str = ""
    """Empty where there is nothing to do."""


def examine(
    connection: Connection,
    job: TempFlowGRPOJob | None = None,
    *,
    probe: bool = False,
    image: str | None = None,
) -> Iterator[Finding]:
    """The findings in the order of the checks; with ``job``, also whether that job could run.

    ``probe`` starts a pod like one of the job's, of ``image`` or the job's own, which does in the
    store what a start of the run does.
    """
    first = _guarded("api server", lambda: _server(connection))
    yield first
    if first.state == "fault":
        return  # every other answer would be the same
    for name, check in _CHECKS.items():
        yield _guarded(name, lambda check=check: check(connection, job))  # type: ignore[misc]
    if probe and job is not None:
        yield _guarded(_INSIDE, lambda: _storage_inside(connection, job, image))


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Forbidden:
        return Finding(name, "unknown", "you may not look at this; an administrator can")
    except ClusterError as error:
        return Finding(name, "fault", str(error), "see the message")


def _server(connection: Connection) -> Finding:
    told = connection.send("GET", "/version", what="version of the API server")
    version = (_number(told["major"]), _number(told["minor"]))
    found = f"Kubernetes {told['gitVersion']} at {connection.server}"
    if version < OLDEST_KUBERNETES:
        needed = ".".join(map(str, OLDEST_KUBERNETES))
        return Finding("api server", "fault", found, f"upgrade the cluster to {needed} or newer")
    return Finding("api server", "ok", found)


def _number(text: str) -> int:
    return int("".join(c for c in text if c.isdigit()) or 0)


def _definition(connection: Connection, _job: TempFlowGRPOJob | None) -> Finding:
    """The fields that the cluster knows, as its OpenAPI tells everybody, against our own."""
    name = "resource definition"
    try:
        told = connection.send(
            "GET", f"/openapi/v3/apis/{naming.API_VERSION}", what=naming.API_VERSION
        )
        theirs = _spec_of(told)
    except NotFound:
        theirs = None
    if theirs is None:
        remedy = "install the chart: helm install tempflow charts/tempflow"
        return Finding(name, "fault", f"{naming.API_VERSION} is not served", remedy)
    here, there = set(_fields(spec_schema())), set(_fields(theirs))
    if here - there:
        missing = ", ".join(sorted(here - there)[:3])
        found = f"older than this tempflow: it does not know {missing}"
        return Finding(name, "fault", found, "upgrade the chart with crds.enabled=true")
    if there - here:
        found = f"newer than this tempflow: it also knows {', '.join(sorted(there - here)[:3])}"
        return Finding(name, "warning", found, "upgrade this tempflow to the cluster's version")
    return Finding(name, "ok", f"{naming.API_VERSION}, as this tempflow has it")


def _spec_of(openapi: Raw) -> Raw | None:
    for schema in openapi.get("components", {}).get("schemas", {}).values():
        for kind in schema.get("x-kubernetes-group-version-kind", ()):
            if kind.get("kind") == naming.KIND:
                found: Raw = schema["properties"]["spec"]
                return found
    return None


def _fields(schema: Raw, path: str = "spec") -> Iterator[str]:
    block = schema.get("items", schema)
    for name, child in block.get("properties", {}).items():
        yield f"{path}.{name}"
        yield from _fields(child, f"{path}.{name}")


def _rights(connection: Connection, _job: TempFlowGRPOJob | None) -> Finding:
    missing = [
        f"{verb} {resource}"
        for group, resource, verbs in NEEDED_RIGHTS
        for verb in verbs
        if not _may(connection, group, resource, verb)
    ]
    where = f"namespace {connection.namespace}"
    if missing:
        remedy = (
            f"have the role bound: kubectl create rolebinding NAME -n {connection.namespace} "
            "--clusterrole=tempflow-edit --user=YOU (--role=tempflow-edit where the operator "
            "watches some namespaces only; with another release name, that in place of tempflow)"
        )
        return Finding("rights", "fault", f"in {where} you may not {', '.join(missing)}", remedy)
    return Finding("rights", "ok", f"jobs, their logs and events in {where}")


def _may(connection: Connection, group: str, resource: str, verb: str) -> bool:
    kind, _, subresource = resource.partition("/")
    attributes = {
        "namespace": connection.namespace,
        "group": group,
        "resource": kind,
        "subresource": subresource,
        "verb": verb,
    }
    answer = connection.send(
        "POST",
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        what="your rights",
        body={
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        },
    )
    return bool(answer["status"].get("allowed"))


def _operator(connection: Connection, _job: TempFlowGRPOJob | None) -> Finding:
    try:
        query = {"labelSelector": _OPERATOR}
        found, _ = every(connection, "/apis/apps/v1/deployments", query, what="the operator")
    except Forbidden:
        return _operator_by_its_work(connection)
    if not found:
        remedy = "install the chart: helm install tempflow charts/tempflow"
        return Finding("operator", "fault", "there is no deployment of the operator", remedy)
    for deployment in found:
        meta, status = deployment["metadata"], deployment.get("status", {})
        name = f"{meta['namespace']}/{meta['name']}"
        wanted, ready = deployment["spec"].get("replicas", 1), status.get("readyReplicas", 0)
        if not ready:
            remedy = f"kubectl describe pods -n {meta['namespace']} -l {_OPERATOR}"
            return Finding("operator", "fault", f"{name}: 0 of {wanted} copies are ready", remedy)
    theirs = found[0]["metadata"]["labels"].get("app.kubernetes.io/version", "")
    told = f"{name}: {ready} of {wanted} copies are ready, version {theirs or 'unknown'}"
    ours = _own_version()
    if theirs and ours and theirs != ours:
        remedy = f"bring both to one version: this tempflow is {ours}"
        return Finding("operator", "warning", told, remedy)
    return Finding("operator", "ok", told)


def _own_version() -> str:
    try:
        return metadata.version("tempflow")
    except metadata.PackageNotFoundError:
        return ""


def _operator_by_its_work(connection: Connection) -> Finding:
    """Who may not look at the operator can still see whether somebody looks after jobs."""
    jobs, _ = every(connection, JOBS.path(connection.namespace), {}, what="jobs")
    now = datetime.now(UTC)
    unseen = [
        raw["metadata"]["name"]
        for raw in jobs
        if not raw.get("status") and _age_seconds(raw, now) > _UNSEEN_SECONDS
    ]
    if unseen:
        remedy = "have an administrator look at the operator's pods and their log"
        found = f"{', '.join(unseen[:3])}: seen by no operator for over a minute"
        return Finding("operator", "fault", found, remedy)
    if any(raw.get("status") for raw in jobs):
        return Finding("operator", "ok", "the jobs of this namespace are looked after")
    return Finding("operator", "unknown", "you may not look at it, and no job tells of it yet")


def _age_seconds(raw: Raw, now: datetime) -> float:
    created = raw["metadata"]["creationTimestamp"].replace("Z", "+00:00")
    return (now - datetime.fromisoformat(created)).total_seconds()


def _gpus(connection: Connection, job: TempFlowGRPOJob | None) -> Finding:
    nodes, _ = every(connection, "/api/v1/nodes", {}, what="nodes")
    usable = [n for n in nodes if not n.get("spec", {}).get("unschedulable")]
    compute = job.spec.compute if job is not None else None
    resource = compute.gpu_resource if compute is not None else _GPU
    counts = [int(n.get("status", {}).get("allocatable", {}).get(resource, "0")) for n in usable]
    found = f"{sum(counts)} {resource} on {len(usable)} schedulable nodes"
    needed, most = _gpus_a_pod(compute) if compute is not None else 0, max(counts, default=0)
    if needed > most:
        remedy = "lower spec.compute.processesPerNode, or add nodes with as many"
        found = f"a pod needs {needed} {resource}, and no node has more than {most}"
        return Finding("gpus", "fault", found, remedy)
    if not sum(counts):
        remedy = f"only jobs with device cpu can run; for {resource}, install the device plugin"
        return Finding("gpus", "warning", found, remedy)
    return Finding("gpus", "ok", found)


def _gpus_a_pod(compute: Compute) -> int:
    each = compute.gpus_per_process
    if each is None:
        each = 1 if compute.device == "cuda" else 0
    return each * compute.processes_per_node


def _queue(connection: Connection, job: TempFlowGRPOJob | None) -> Finding:
    groups = connection.send("GET", "/apis", what="API groups")["groups"]
    kueue = next((group for group in groups if group["name"] == _KUEUE), None)
    wanted = job.spec.run_policy.queue if job is not None else None
    if kueue is None:
        if wanted:
            found = f"the job names the queue {wanted}, and Kueue is not installed"
            return Finding("queue", "fault", found, "remove spec.runPolicy.queue")
        return Finding("queue", "ok", "no Kueue; jobs start at once")
    version = kueue["preferredVersion"]["version"]
    path = f"/apis/{_KUEUE}/{version}/namespaces/{connection.namespace}/localqueues"
    queues, _ = every(connection, path, {}, what="queues")
    names = sorted(queue["metadata"]["name"] for queue in queues)
    where = f"namespace {connection.namespace}"
    if wanted and wanted not in names:
        found = f"the job names the queue {wanted}; {where} has {', '.join(names) or 'none'}"
        return Finding("queue", "fault", found, "name one of these in spec.runPolicy.queue")
    if not names:
        remedy = "have a LocalQueue created, or jobs that name one will wait for ever"
        return Finding("queue", "warning", f"Kueue is there, and {where} has no LocalQueue", remedy)
    return Finding("queue", "ok", f"Kueue, queues {', '.join(names)}")


def _dns(connection: Connection, _job: TempFlowGRPOJob | None) -> Finding:
    query = {"labelSelector": "kubernetes.io/service-name=kube-dns"}
    path = "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices"
    slices, _ = every(connection, path, query, what="the cluster's DNS")
    ready = sum(
        (endpoint.get("conditions") or {}).get("ready") is not False
        for part in slices
        for endpoint in part.get("endpoints") or []
    )
    if not ready:
        remedy = "ranks cannot find each other: kubectl get pods -n kube-system -l k8s-app=kube-dns"
        return Finding("dns", "fault", "kube-dns has no endpoint that is ready", remedy)
    return Finding("dns", "ok", f"kube-dns has {ready} endpoint(s)")


def _storage(_connection: Connection, job: TempFlowGRPOJob | None) -> Finding:
    from tempflow import checkpoints

    kept = job.spec.checkpoint if job is not None else None
    if kept is None or kept.uri is None:
        return Finding("storage", "unknown", "name a manifest, and its store is looked at")
    store = checkpoints.open_store(kept.uri, kept.endpoint_url, kept.region)
    try:
        checkpoints.steps(store)
    except StoreUnavailable as error:
        remedy = (
            "create the bucket, or correct spec.checkpoint and the credentials of this machine; "
            "pods have their own, of the Secret in spec.compute.secretName"
        )
        return Finding("storage", "fault", str(error), remedy)
    return Finding("storage", "ok", f"{kept.uri} can be listed from this machine")


def _storage_inside(connection: Connection, job: TempFlowGRPOJob, image: str | None) -> Finding:
    kept = job.spec.checkpoint
    if kept.uri is None or not kept.uri.startswith("s3://"):
        found = f"spec.checkpoint.uri is {kept.uri or 'missing'}, which no pod reaches"
        return Finding(_INSIDE, "fault", found, "write s3://bucket/prefix there")
    used = image or job.spec.compute.image or _image_in_use(connection)
    if used is None:
        found = "the manifest names no spec.compute.image, and no pod here tells of one"
        return Finding(_INSIDE, "unknown", found, "name the trainer's image with --image")
    try:
        with reader(
            connection,
            job.spec,
            kept,
            namespace=connection.namespace,
            image=used,
            give_up_seconds=_PROBE_SECONDS,
        ) as files:
            files.probe()
    except StoreUnavailable as error:
        remedy = "correct spec.checkpoint, or the credentials in the Secret of spec.compute"
        return Finding(_INSIDE, "fault", str(error), remedy)
    except Forbidden as error:
        return Finding(_INSIDE, "unknown", str(error))
    found = f"a pod can create, list, read and delete in {kept.uri}"
    return Finding(_INSIDE, "ok", found)


def _image_in_use(connection: Connection) -> str | None:
    """What the chart's trainerImage was for the last job of this namespace."""
    query = {"labelSelector": naming.LABEL_JOB_UID}
    pods, _ = every(connection, PODS.path(connection.namespace), query, what="pods")
    return reader_pod.image_of(pods)


def _objects(connection: Connection, job: TempFlowGRPOJob | None) -> Finding:
    """What the manifest names; a Secret's values are not looked at."""
    if job is None:
        return Finding("objects", "unknown", "name a manifest, and what it names is looked for")
    wanted = list(needs.named(job.spec, connection.namespace))
    wrong, hidden = [], []
    for one in wanted:
        try:
            found = connection.send("GET", f"{one.path}/{one.name}", what=str(one))
        except NotFound:
            wrong.append(f"there is no {one}")
            continue
        except Forbidden:
            hidden.append(str(one))
            continue
        complaint = one.wrong(found)
        if complaint:
            wrong.append(f"{one} {complaint}")
        if one.word == "PersistentVolumeClaim" and (another := needs.storage_class(found)):
            wanted.append(another)
    if wrong:
        where = f"create what is missing in namespace {connection.namespace}"
        return Finding("objects", "fault", "; ".join(wrong), f"{where}, or correct these fields")
    if hidden:
        return Finding("objects", "unknown", f"you may not look at {', '.join(hidden)}")
    return Finding("objects", "ok", f"{', '.join(map(str, wanted)) or 'the manifest names none'}")


def _images(connection: Connection, _job: TempFlowGRPOJob | None) -> Finding:
    query = {"labelSelector": naming.LABEL_JOB_UID}
    pods, _ = every(connection, PODS.path(connection.namespace), query, what="pods")
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses") or []:
            waiting = status.get("state", {}).get("waiting") or {}
            if waiting.get("reason") in reader_pod.PULL_REASONS:
                found = f"{pod['metadata']['name']}: {status['image']}: {waiting['reason']}"
                remedy = "correct spec.compute.image (or the chart's trainerImage), or push it"
                return Finding("images", "fault", found, remedy)
    if not pods:
        return Finding("images", "unknown", "no pod has pulled one in this namespace yet")
    return Finding("images", "ok", f"pulled by {len(pods)} pod(s) of this namespace")


_Check = Callable[[Connection, TempFlowGRPOJob | None], Finding]
_CHECKS: dict[str, _Check] = {
    "resource definition": _definition,
    "rights": _rights,
    "operator": _operator,
    "gpus": _gpus,
    "queue": _queue,
    "dns": _dns,
    "objects": _objects,
    "storage": _storage,
    "images": _images,
}


def lines(findings: Sequence[Finding]) -> list[str]:
    """For people."""
    width = max(len(finding.check) for finding in findings)
    told = []
    for finding in findings:
        told.append(f"{finding.state:<7}  {finding.check:<{width}}  {finding.found}")
        if finding.remedy:
            told.append(f"{'':<7}  {'':<{width}}  -> {finding.remedy}")
    return told


def as_objects(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [vars(finding) for finding in findings]
