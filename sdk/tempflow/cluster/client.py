"""The client: what a user does with jobs on a cluster."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from tempflow.checkpoints import Step, Store
from tempflow.cluster import logs as log_reading
from tempflow.cluster import reader_pod
from tempflow.cluster.connection import (
    CONFIG_MAPS,
    EVENTS,
    JOBS,
    MERGE_PATCH,
    PODS,
    READ_SECONDS,
    Connection,
    Raw,
    connect,
)
from tempflow.cluster.errors import (
    ClusterError,
    Conflict,
    JobFailed,
    NotFound,
    WaitTimeout,
)
from tempflow.cluster.job import Event, Job, JobEvent, LogLine, concerns, event_of
from tempflow.cluster.reader import reader
from tempflow.cluster.submission import Prompts, prepare
from tempflow.cluster.watching import Patience, changes, every, passes
from tempflow.manifest import Manifest
from tempflow_api import naming
from tempflow_api.conditions import ConditionType
from tempflow_api.v1alpha1 import TempFlowGRPOJob

DryRun = Literal["client", "server"]

GIVE_UP_SECONDS = 300.0
"""How long what follows a job bears an API server that does not answer: a control plane of one
machine that is upgraded is away for a minute or two."""


class Client:
    """Jobs of one cluster, seen from one namespace.

    Every method raises a kind of ``ClusterError`` (Unreachable, Unauthorized, Forbidden, NotFound,
    NotInstalled, Conflict, Invalid) when the cluster does not do what it is asked.
    """

    def __init__(
        self,
        *,
        kubeconfig: str | None = None,
        context: str | None = None,
        namespace: str | None = None,
        give_up_seconds: float | None = GIVE_UP_SECONDS,
    ) -> None:
        """Nothing is asked of the cluster yet.

        Without arguments, the cluster and namespace that kubectl would take; inside a pod without
        a kubeconfig, those of the pod. Proxies come from ``HTTPS_PROXY`` and ``NO_PROXY``, or from
        ``proxy-url`` in the kubeconfig.
        """
        self._connection = connect(kubeconfig=kubeconfig, context=context, namespace=namespace)
        self._give_up_seconds = give_up_seconds

    @property
    def connection(self) -> Connection:
        """For requests that this class has no method for."""
        return self._connection

    @property
    def namespace(self) -> str:
        return self._connection.namespace

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        job: TempFlowGRPOJob | Manifest,
        *,
        namespace: str | None = None,
        dry_run: bool = False,
    ) -> Job:
        """Create the job; a local file of prompts goes along as a ConfigMap that the job owns.

        ``dry_run`` has the API server check and complete everything, and store nothing. The
        namespace is the one given, else the manifest's, else the client's. Raises ManifestInvalid
        for paths that no pod could see, and Conflict when there is a job of that name.
        """
        manifest = job if isinstance(job, Manifest) else Manifest(job, "job")
        submission = prepare(manifest)
        target = self._target(manifest, namespace)
        name = submission.job.metadata.name
        query = {"dryRun": "All"} if dry_run else {}
        made = submission.prompts is not None and self._bring(
            submission.prompts, target, name, query
        )
        try:
            raw = self._create_job(submission.body(target), target, query)
        except ClusterError:
            if made and submission.prompts is not None and not dry_run:
                self._remove(submission.prompts, target)
            raise
        if submission.prompts is not None and not dry_run:
            self._hand_over(submission.prompts, raw)
        return Job(raw)

    def _target(self, manifest: Manifest, namespace: str | None) -> str:
        written = manifest.job.metadata.namespace
        if namespace and written and namespace != written:
            raise Conflict(
                f"{manifest.name} is for namespace {written}, and {namespace} was asked for: "
                "change one of them"
            )
        return namespace or written or self.namespace

    def _create_job(self, body: Raw, namespace: str, query: dict[str, str]) -> Raw:
        what = f"job {namespace}/{body['metadata']['name']}"
        path = JOBS.path(namespace)
        try:
            return self._connection.send("POST", path, what=what, query=query, body=body)
        except Conflict as error:
            raise Conflict(
                f"{what} exists already: choose another name (--set metadata.name=...), see what "
                "differs with 'tempflow diff', or delete it first",
                error.code,
            ) from error

    def _bring(self, prompts: Prompts, namespace: str, job: str, query: dict[str, str]) -> bool:
        """Create the ConfigMap; False when it is there: its name has the digest of its content."""
        what = f"ConfigMap {namespace}/{prompts.name}"
        body = prompts.body(namespace, job)
        path = CONFIG_MAPS.path(namespace)
        try:
            self._connection.send("POST", path, what=what, query=query, body=body)
        except Conflict:
            return False
        return True

    def _remove(self, prompts: Prompts, namespace: str) -> None:
        path = CONFIG_MAPS.path(namespace, prompts.name)
        self._connection.send("DELETE", path, what=f"ConfigMap {namespace}/{prompts.name}")

    def _hand_over(self, prompts: Prompts, job: Raw) -> None:
        """With the job, the garbage collector takes its prompts."""
        meta = job["metadata"]
        owner = {
            "apiVersion": naming.API_VERSION,
            "kind": naming.KIND,
            "name": meta["name"],
            "uid": meta["uid"],
        }
        namespace, what = meta["namespace"], f"ConfigMap {meta['namespace']}/{prompts.name}"
        owned = {"metadata": {"ownerReferences": [owner]}}
        path = CONFIG_MAPS.path(namespace, prompts.name)
        try:
            self._connection.send("PATCH", path, what=what, body=owned, content_type=MERGE_PATCH)
        except NotFound:
            # It was an earlier job's of that name, and went with it just now.
            body = prompts.body(namespace, meta["name"])
            body["metadata"].update(owned["metadata"])
            self._connection.send("POST", CONFIG_MAPS.path(namespace), what=what, body=body)

    def get(self, name: str, *, namespace: str | None = None) -> Job:
        """Raises NotFound."""
        return self._get(name, READ_SECONDS, namespace)

    def _get(self, name: str, read_seconds: float, namespace: str | None = None) -> Job:
        target = namespace or self.namespace
        path, what = JOBS.path(target, name), f"job {target}/{name}"
        return Job(self._connection.send("GET", path, what=what, read_seconds=read_seconds))

    def list(self, *, all_namespaces: bool = False, selector: str = "") -> Sequence[Job]:
        """By namespace and name; ``selector`` is a label selector."""
        path = JOBS.path(None if all_namespaces else self.namespace)
        query = {"labelSelector": selector} if selector else {}
        found, _ = every(self._connection, path, query, what=self._jobs(all_namespaces))
        return sorted(map(Job, found), key=lambda job: (job.namespace, job.name))

    def _jobs(self, all_namespaces: bool) -> str:
        return "jobs of all namespaces" if all_namespaces else f"jobs of namespace {self.namespace}"

    def watch(self, name: str | None = None, *, all_namespaces: bool = False) -> Iterator[JobEvent]:
        """The job, or every job, as it is and then at each change; without end.

        Survives a lost connection and a restart of the API server: no change is told twice, and
        none is lost, though two that came in between may be told as one.
        """
        path = JOBS.path(None if all_namespaces else self.namespace)
        query = {"fieldSelector": f"metadata.name={name}"} if name else {}
        what = f"job {self.namespace}/{name}" if name else self._jobs(all_namespaces)
        for kind, raw in changes(
            self._connection, path, query, what=what, give_up_seconds=self._give_up_seconds
        ):
            yield JobEvent(kind, Job(raw))

    def wait(
        self,
        name: str,
        *,
        until: ConditionType | str = ConditionType.FINISHED,
        timeout_seconds: float | None = None,
        on_change: Callable[[Job], None] = lambda _job: None,
    ) -> Job:
        """The job once that condition is True.

        Raises JobFailed when it failed instead, or failed at all where the end is waited for;
        NotFound when it is deleted meanwhile; WaitTimeout.
        """
        kind = ConditionType(until)
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        patience = Patience(self._give_up_seconds)
        first = self.get(name)  # a job that is not there is an error at once
        uid, version = first.uid, ""
        while True:
            try:
                job = self._get(name, _seconds_left(deadline))
                patience.answered()
            except NotFound as error:
                raise NotFound(f"job {self.namespace}/{name} was deleted", 404) from error
            except ClusterError as error:
                if deadline is not None and time.monotonic() >= deadline and passes(error):
                    raise WaitTimeout(
                        f"job {self.namespace}/{name}: not {kind} after {timeout_seconds:.0f} s, "
                        f"as far as is known: {error}"
                    ) from error
                patience.endure(error)
                continue
            if job.uid != uid:
                raise NotFound(f"job {self.namespace}/{name} was deleted and created anew", 404)
            if job.resource_version != version:
                version = job.resource_version
                on_change(job)
            if _reached(job, kind):
                return job
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(
                    f"job {self.namespace}/{name}: not {kind} after {timeout_seconds:.0f} s; it is "
                    f"{job.phase or 'not seen by an operator yet'} ({job.why or 'no status'})"
                )
            time.sleep(1.0 if deadline is None else max(0.0, min(1.0, deadline - time.monotonic())))

    def logs(
        self,
        name: str,
        *,
        follow: bool = False,
        attempt: int | None = None,
        previous: bool = False,
        ranks: Sequence[int] = (),
        tail: int | None = None,
        timeout_seconds: float | None = None,
        on_trouble: Callable[[str], None] | None = None,
    ) -> Iterator[LogLine]:
        """What the pods wrote, in the order of time: of the newest attempt, of ``attempt``, or of
        the one before (``previous``); of all pods, or of those with that index (``ranks``).

        ``follow`` goes on until the job, or the named attempt, has ended, and takes later attempts
        along; it survives a lost connection and a restart of the API server without losing or
        repeating a line. ``tail`` starts with the last lines of each pod. A pod whose log cannot be
        read any more ends a followed log with its error, or is told to ``on_trouble``.
        Raises WaitTimeout when a followed log has not ended after ``timeout_seconds``.
        """
        job = self.get(name)
        number = _attempt(job, attempt, previous=previous)
        wanted = frozenset(ranks)
        pods = self._pods(job)
        chosen = number if number is not None else _newest(pods)
        now = log_reading.of_pods(pods, attempt=chosen, ranks=wanted)
        if not now and not follow:
            raise NotFound(_no_logs(job, number, wanted), 404)
        yield from log_reading.merged(self._connection, now.values(), last=not follow, tail=tail)
        if not follow:
            return
        follower = log_reading.Follower(self._connection, self._give_up_seconds, on_trouble)
        for uid, log in now.items():
            follower.start(uid, log)
        patience = Patience(self._give_up_seconds)

        def more(follower: log_reading.Follower) -> bool:
            try:
                over = self._is_over(job, number)
                current = self._pods(job)  # after the question, so that none is missed
            except ClusterError as error:
                patience.endure(error)
                return True
            patience.answered()
            later = [pod for pod in current if number or _attempt_of(pod) >= (chosen or 0)]
            for uid, log in log_reading.of_pods(later, attempt=number, ranks=wanted).items():
                follower.start(uid, log)
            return not over

        yield from log_reading.live(follower, more=more, timeout_seconds=timeout_seconds)

    def _pods(self, job: Job) -> Sequence[Raw]:
        query = {"labelSelector": f"{naming.LABEL_JOB_UID}={job.uid}"}
        what = f"pods of job {job.namespace}/{job.name}"
        found, _ = every(self._connection, PODS.path(job.namespace), query, what=what)
        return found

    def _is_over(self, job: Job, attempt: int | None) -> bool:
        """Whether no further pod of the job, or of that attempt, will come."""
        try:
            now = self.get(job.name, namespace=job.namespace)
        except NotFound:
            return True
        if now.uid != job.uid or now.finished:
            return True
        return attempt is not None and now.status.attempt > attempt

    def events(self, name: str, *, follow: bool = False) -> Iterator[Event]:
        """What the cluster told about the job, its Job and its pods, oldest first; they are kept
        for an hour. ``follow`` goes on without end; an event that repeats comes again."""
        job = self.get(name)
        path, what = EVENTS.path(job.namespace), f"events of job {job.namespace}/{name}"
        if not follow:
            found, _ = every(self._connection, path, {}, what=what)
            ours = [event_of(raw) for raw in found if concerns(raw, name, job.uid)]
            yield from sorted(ours, key=lambda event: event.time)
            return
        for kind, raw in changes(
            self._connection, path, {}, what=what, give_up_seconds=self._give_up_seconds
        ):
            if kind != "deleted" and concerns(raw, name, job.uid):
                yield event_of(raw)

    def suspend(self, name: str) -> Job:
        """Stop it after a checkpoint, until ``resume``. Raises Conflict when it has ended."""
        return self._set(name, suspend=True)

    def resume(self, name: str) -> Job:
        """Go on after ``suspend``. Raises Conflict when it has ended."""
        return self._set(name, suspend=False)

    def cancel(self, name: str) -> Job:
        """Stop it after a checkpoint, for good; it, its logs and checkpoints stay. Raises Conflict
        when it has ended."""
        return self._set(name, cancel=True)

    def _set(self, name: str, **run_policy: bool) -> Job:
        job = self.get(name)
        if job.is_true(ConditionType.SUCCEEDED) or job.is_true(ConditionType.FAILED):
            raise Conflict(f"job {self.namespace}/{name} has ended ({job.why})")
        # With the UID, or a new job of the same name could be meant.
        body = {"metadata": {"uid": job.uid}, "spec": {"runPolicy": run_policy}}
        raw = self._connection.send(
            "PATCH",
            JOBS.path(self.namespace, name),
            what=f"job {self.namespace}/{name}",
            body=body,
            content_type=MERGE_PATCH,
        )
        return Job(raw)

    def delete(self, name: str, *, wait: bool = True, timeout_seconds: float | None = None) -> None:
        """Delete it with its pods, which write a last checkpoint; checkpoints stay.

        Waits until all is gone. Raises WaitTimeout.
        """
        job = self.get(name)
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": job.uid},
        }
        path, what = JOBS.path(self.namespace, name), f"job {self.namespace}/{name}"
        self._connection.send("DELETE", path, what=what, body=body)
        started, patience = time.monotonic(), Patience(self._give_up_seconds)
        while wait:
            try:
                if self.get(name).uid != job.uid:
                    return
                patience.answered()
            except NotFound:
                return
            except ClusterError as error:
                patience.endure(error)
            if timeout_seconds is not None and time.monotonic() - started >= timeout_seconds:
                raise WaitTimeout(f"{what}: not gone after {timeout_seconds:.0f} s")
            time.sleep(0.5)

    def checkpoints(self, name: str) -> Sequence[Step]:
        """The complete checkpoints of the job's run, oldest first, read from its store with this
        machine's credentials. Raises StoreUnavailable."""
        from tempflow import checkpoints

        return checkpoints.steps(checkpoints.open_store(*self.store_of(name)))

    @contextmanager
    def store_inside(
        self,
        name: str,
        *,
        image: str | None = None,
        on_start: Callable[[str], None] = lambda _pod: None,
    ) -> Iterator[Store]:
        """The store of the job's run, read from inside the cluster, where it may be all that can.

        A pod like the job's own, but without GPUs, reads it, and what it reads comes here through
        the API server; the pod is deleted at the end of the block. ``image`` is the trainer's;
        without it, that of the job. Raises NotFound where that cannot be known any more, Forbidden
        without the role ``tempflow-via-cluster``, and WaitTimeout when the pod does not start.
        """
        from tempflow import checkpoints

        job = self.get(name)
        uri, _, _ = self.store_of(name)
        described = job.spec.checkpoint.model_copy(update={"uri": uri})
        with reader(
            self._connection,
            job.spec,
            described,
            namespace=job.namespace,
            image=image or self._image_of(job),
            owner=dict(job.raw),
            give_up_seconds=self._give_up_seconds,
            on_start=on_start,
        ) as files:
            yield checkpoints.Store(files, uri.removeprefix("s3://"), uri)

    def _image_of(self, job: Job) -> str:
        image = job.spec.compute.image or reader_pod.image_of(self._pods(job))
        if image is None:
            raise NotFound(
                f"job {job.namespace}/{job.name} names no spec.compute.image, and its pods are "
                "gone: say with --image which image of the trainer is to read its store",
                404,
            )
        return image

    def store_of(self, name: str) -> tuple[str, str | None, str | None]:
        """Where the job's run is stored: address, endpoint and region."""
        job = self.get(name)
        kept = job.spec.checkpoint
        uri = f"{(kept.uri or '').rstrip('/')}/{job.run_folder}"
        return uri, kept.endpoint_url, kept.region


def _seconds_left(deadline: float | None) -> float:
    """For an answer: at least a second, as what is over by then may be what was waited for."""
    if deadline is None:
        return READ_SECONDS
    return min(READ_SECONDS, max(1.0, deadline - time.monotonic()))


def _reached(job: Job, kind: ConditionType) -> bool:
    """Raises JobFailed when it cannot come to that any more, or has come to a bad end."""
    failed = job.is_true(ConditionType.FAILED)
    if kind is ConditionType.FAILED:
        reached = failed
    elif failed and (job.finished or kind is not ConditionType.FINISHED):
        raise JobFailed(f"job {job.namespace}/{job.name} failed: {job.why}")
    else:
        reached = job.is_true(kind)
    if not reached and job.succeeded and job.finished:
        raise JobFailed(f"job {job.namespace}/{job.name} has succeeded and will never be {kind}")
    return reached


def _attempt(job: Job, attempt: int | None, *, previous: bool) -> int | None:
    if not previous:
        return attempt
    if attempt is not None:
        raise Conflict("an attempt by number and the previous one: name one of them")
    if job.status.attempt < 2:
        raise NotFound(f"job {job.namespace}/{job.name} has had no attempt before this one", 404)
    return job.status.attempt - 1


def _attempt_of(pod: Raw) -> int:
    return int(pod["metadata"]["labels"].get(naming.LABEL_ATTEMPT, "0"))


def _newest(pods: Sequence[Raw]) -> int | None:
    return max((_attempt_of(pod) for pod in pods), default=None)


def _no_logs(job: Job, attempt: int | None, ranks: frozenset[int]) -> str:
    which = f" of attempt {attempt}" if attempt is not None else ""
    which += f" with index {', '.join(map(str, sorted(ranks)))}" if ranks else ""
    return (
        f"job {job.namespace}/{job.name} has no pod{which} that has started: it is "
        f"{job.phase or 'not seen by an operator yet'} ({job.why or 'no status'}); the pods of the "
        "last two attempts are kept"
    )
