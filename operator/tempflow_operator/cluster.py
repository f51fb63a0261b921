"""The only file that calls the API server. What may be called is what stands here.

Objects are plain JSON: typed classes for 4,000 pods would cost ten times the memory.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

from tempflow_api import naming
from tempflow_api.status import JobStatus
from tempflow_operator.decisions import instants
from tempflow_operator.decisions.adoption import controller_uid, owned_by
from tempflow_operator.decisions.events import Tell
from tempflow_operator.decisions.observed import (
    Key,
    Snapshot,
    TrainingJob,
    may_have_policy,
    snapshot,
    starts_servers,
    training_job,
)
from tempflow_operator.decisions.plan import Action, Create, Delete
from tempflow_operator.decisions.status import stored_form
from tempflow_operator.desired.gang import SCHEDULERS
from tempflow_operator.metrics import Metrics

Raw = dict[str, Any]

_TIMEOUT_SECONDS = 10.0
_PAGE = 200
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


@dataclass(frozen=True)
class Resource:
    """One kind of object, as its address spells it."""

    api: str
    plural: str

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        scope = f"namespaces/{namespace}/" if namespace else ""
        parts = [self.api, f"{scope}{self.plural}", name, subresource]
        return "/" + "/".join(part for part in parts if part)


TRAINING_JOBS = Resource(f"apis/{naming.API_VERSION}", naming.PLURAL)
JOBS = Resource("apis/batch/v1", "jobs")
DEPLOYMENTS = Resource("apis/apps/v1", "deployments")
PODS = Resource("api/v1", "pods")
SERVICES = Resource("api/v1", "services")
CONFIG_MAPS = Resource("api/v1", "configmaps")
NETWORK_POLICIES = Resource("apis/networking.k8s.io/v1", "networkpolicies")
EVENTS = Resource("apis/events.k8s.io/v1", "events")
LEASES = Resource("apis/coordination.k8s.io/v1", "leases")

_BY_KIND = {
    naming.KIND: TRAINING_JOBS,
    "Job": JOBS,
    "Deployment": DEPLOYMENTS,
    "Service": SERVICES,
    "ConfigMap": CONFIG_MAPS,
    "NetworkPolicy": NETWORK_POLICIES,
}


_WITH_PODS = ("Job", "Deployment")


class ApiError(Exception):
    """The API server did not do what it was asked."""

    def __init__(self, request: str, code: int, reason: str, message: str) -> None:
        super().__init__(f"{request}: {code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message

    @property
    def refused(self) -> bool:
        """The request itself is at fault: the same one would be refused again, until something
        else changes (a quota, a policy, a permission)."""
        return self.code in (400, 403, 413, 422)


class NameTaken(Exception):
    """An object that the job does not own has the name of one that it needs."""


@dataclass(frozen=True)
class Observation:
    """One job and everything that belongs to it."""

    job: TrainingJob
    seen: Snapshot
    newest: Mapping[str, int]
    """By kind, the highest resource version that was listed."""


class Cluster:
    """The calls of the operator."""

    def __init__(self, api: ApiClient, metrics: Metrics, gang_scheduler: str = "") -> None:
        """``gang_scheduler`` is the one whose PodGroups are looked for and created."""
        self._api = api
        self._metrics = metrics
        self._by_kind = dict(_BY_KIND)
        self._parts = ["Service", "ConfigMap", "NetworkPolicy"]
        scheduler = SCHEDULERS.get(gang_scheduler)
        if scheduler is not None:
            self._by_kind["PodGroup"] = Resource(f"apis/{scheduler.api_version}", "podgroups")
            self._parts.append("PodGroup")

    @classmethod
    async def connect(cls, metrics: Metrics, gang_scheduler: str = "") -> "Cluster":
        """With the pod's service account, or else with the kubeconfig of the environment."""
        # The environment's proxy is for the outside world, and the watches do not follow it either.
        # Looking it up takes files and a thread, for every request.
        settings = Configuration(client_session_kwargs={"trust_env": False})
        try:
            config.load_incluster_config(settings)  # type: ignore[no-untyped-call]  # no types
        except config.ConfigException:
            await config.load_kube_config(client_configuration=settings)  # type: ignore[no-untyped-call]  # no types
        return cls(ApiClient(settings), metrics, gang_scheduler)

    async def close(self) -> None:
        await self._api.close()  # type: ignore[no-untyped-call]  # no types

    async def observe(self, key: Key) -> Observation | None:
        """The job and its children, read anew; None when the job is gone.

        The lists are consistent reads: what an earlier call of this operator created is in them.
        """
        raw = await self._get(TRAINING_JOBS, key.namespace, key.name)
        if raw is None:
            return None
        uid = raw["metadata"]["uid"]
        selector = f"{naming.LABEL_JOB_UID}={uid}"
        # One after the other: on a connection that is open already they take less time together
        # than it takes to open four more, as a pass after a quiet minute would have to.
        jobs = await self._list(JOBS, key.namespace, selector)
        pods = await self._list(PODS, key.namespace, selector)
        deployments = await self._deployments(raw, selector)
        parts = {kind: await self._part(kind, raw, selector) for kind in self._parts}
        seen = snapshot(uid, jobs=jobs, pods=pods, parts=parts, deployments=deployments)
        newest = {"jobs": _newest(jobs), "pods": _newest(pods), naming.PLURAL: _newest([raw])}
        return Observation(training_job(raw), seen, newest)

    async def _deployments(self, raw: Raw, selector: str) -> list[Raw]:
        """Most jobs have none, and are not asked for them."""
        if not starts_servers(raw):
            return []
        return await self._list(DEPLOYMENTS, raw["metadata"]["namespace"], selector)

    async def _part(self, kind: str, raw: Raw, selector: str) -> list[Raw]:
        if kind == "NetworkPolicy" and not may_have_policy(raw):
            return []
        resource, namespace = self._by_kind[kind], raw["metadata"]["namespace"]
        return await self._list(resource, namespace, selector, accept=_METADATA_ONLY)

    async def execute(self, namespace: str, action: Action) -> None:
        """Do it; done before counts as done now."""
        match action:
            case Create():
                await self._create(namespace, action)
            case Delete():
                await self._delete(namespace, action)

    async def _create(self, namespace: str, action: Create) -> None:
        resource, manifest = self._by_kind[action.kind], dict(action.manifest)
        try:
            await self._send("create", resource, namespace, body=manifest)
        except ApiError as error:
            if error.code != 409:
                raise
            await self._adopt(resource, namespace, action)

    async def _adopt(self, resource: Resource, namespace: str, action: Create) -> None:
        """The name exists. It is ours if an earlier pass, whose answer was lost, created it."""
        found = await self._get(resource, namespace, action.name)
        owner = controller_uid(action.manifest["metadata"])
        if found is None or owner is None or not owned_by(found["metadata"], owner):
            raise NameTaken(
                f"{action.kind} {namespace}/{action.name} belongs to somebody else: delete or "
                "rename it, or give the job another name"
            )

    async def _delete(self, namespace: str, action: Delete) -> None:
        # Foreground: the object stays in the lists, marked, until its pods are gone.
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground" if action.kind in _WITH_PODS else "Background",
            "preconditions": {"uid": action.uid},
        }
        resource = self._by_kind[action.kind]
        try:
            await self._send("delete", resource, namespace, name=action.name, body=body)
        except ApiError as error:
            # 404: gone. 409: another object has the name by now, and ours is gone.
            if error.code not in (404, 409):
                raise

    async def write_status(self, job: TrainingJob, status: JobStatus) -> None:
        """Replace the status of exactly the version that was read: a leader that was overtaken
        gets a conflict."""
        body = [
            {"op": "replace", "path": "/metadata/resourceVersion", "value": job.resource_version},
            {"op": "add", "path": "/status", "value": stored_form(status)},
        ]
        await self._send(
            "patch",
            TRAINING_JOBS,
            job.namespace,
            name=job.name,
            subresource="status",
            body=body,
            content_type="application/json-patch+json",
        )

    async def tell(self, job: TrainingJob, tell: Tell, now: float, identity: str) -> None:
        """Write an event, or that it happened again. A series has one name, so that an operator
        which was restarted in the middle continues it."""
        digest = hashlib.sha256(repr((job.uid, tell.event)).encode()).hexdigest()
        name = f"{job.name}.{digest[:16]}"
        if tell.count > 1 and await self._tell_again(job, name, tell.count, now):
            return
        try:
            body = _event(job, name, tell, now, identity)
            await self._send("create", EVENTS, job.namespace, body=body)
        except ApiError as error:
            if error.code != 409:
                raise
            await self._tell_again(job, name, tell.count + 1, now)

    async def _tell_again(self, job: TrainingJob, name: str, count: int, now: float) -> bool:
        """False when the event is there no more: they are kept for an hour."""
        series = {"count": count, "lastObservedTime": instants.micro_timestamp(now)}
        body = {"series": series}
        kind = "application/merge-patch+json"
        try:
            await self._send(
                "patch", EVENTS, job.namespace, name=name, body=body, content_type=kind
            )
        except ApiError as error:
            if error.code != 404:
                raise
            return False
        return True

    async def training_jobs(self, namespace: str | None) -> AsyncIterator[Raw]:
        """All jobs of a namespace, or of the cluster, page by page."""
        token = ""
        while True:
            query = {"limit": str(_PAGE), **({"continue": token} if token else {})}
            page = await self._send("list", TRAINING_JOBS, namespace, query=query)
            for raw in page["items"] or []:
                yield raw
            token = page["metadata"].get("continue", "")
            if not token:
                return

    async def lease(self, namespace: str, name: str) -> Raw | None:
        return await self._get(LEASES, namespace, name)

    async def create_lease(self, namespace: str, body: Raw) -> Raw:
        return await self._send("create", LEASES, namespace, body=body)

    async def replace_lease(self, namespace: str, name: str, body: Raw) -> Raw:
        """Conflicts when the Lease is not the one that was read."""
        return await self._send("update", LEASES, namespace, name=name, body=body)

    async def _get(self, resource: Resource, namespace: str, name: str) -> Raw | None:
        try:
            return await self._send("get", resource, namespace, name=name)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def _list(
        self, resource: Resource, namespace: str, selector: str, *, accept: str = ""
    ) -> list[Raw]:
        query = {"labelSelector": selector}
        page = await self._send("list", resource, namespace, query=query, accept=accept)
        items: list[Raw] = page["items"] or []  # null in an empty list of metadata
        return items

    async def _send(
        self,
        verb: str,
        resource: Resource,
        namespace: str | None,
        *,
        name: str = "",
        subresource: str = "",
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        accept: str = "",
    ) -> Raw:
        """One request; ``verb`` is the one that access rules name."""
        path = resource.path(namespace, name, subresource)
        method = _METHODS[verb]
        headers = {"Accept": accept or "application/json"}
        parameters = list((query or {}).items())
        if body is not None:
            headers["Content-Type"] = content_type
        if verb in ("create", "update", "patch"):
            parameters.append(("fieldManager", naming.FIELD_MANAGER))
        call = await self._api.param_serialize(
            method,
            path,
            query_params=parameters,
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        response = await self._api.call_api(*call, _request_timeout=timeout)
        text = await response.read()  # type: ignore[no-untyped-call]  # no types
        self._metrics.requests.labels(verb, resource.plural, str(response.status)).inc()
        return _answer(f"{verb} {path}", response.status, text)


_METHODS = {
    "get": "GET",
    "list": "GET",
    "create": "POST",
    "update": "PUT",
    "patch": "PATCH",
    "delete": "DELETE",
}


def _answer(request: str, code: int, text: bytes) -> Raw:
    try:
        body = json.loads(text)
    except ValueError:
        body = {"reason": "NotJSON", "message": text[:200].decode(errors="replace")}
    if code >= 400:
        raise ApiError(request, code, body.get("reason", ""), body.get("message", ""))
    answer: Raw = body
    return answer


def _event(job: TrainingJob, name: str, tell: Tell, now: float, identity: str) -> Raw:
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": job.namespace},
        "eventTime": instants.micro_timestamp(now),
        "reportingController": naming.OPERATOR,
        "reportingInstance": identity[:128],
        "action": "Reconcile",
        "type": tell.event.type,
        "reason": tell.event.reason,
        "note": tell.event.note,
        "regarding": {
            "apiVersion": naming.API_VERSION,
            "kind": naming.KIND,
            "name": job.name,
            "namespace": job.namespace,
            "uid": job.uid,
        },
    }


def _newest(objects: list[Raw]) -> int:
    """The highest resource version, as a number: since 1.35 they are specified to compare so, and
    etcd has always counted that way."""
    versions = (raw["metadata"].get("resourceVersion", "") for raw in objects)
    return max((int(version) for version in versions if version.isdecimal()), default=0)
