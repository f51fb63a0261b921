"""A store that only the cluster reaches, read from here: a pod there, and a tunnel to it.

Everything is done with the caller's own rights; the operator has no part in it. The pod lives as
long as the ``with`` block, also where that is left by Ctrl-C.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tempflow.cluster import reader_pod
from tempflow.cluster.connection import PODS, Connection, Raw
from tempflow.cluster.errors import ClusterError, Forbidden, NotFound, WaitTimeout
from tempflow.cluster.remote_files import RemoteFiles
from tempflow.cluster.tunnel import Tunnel
from tempflow.cluster.watching import every, passes
from tempflow_api import naming
from tempflow_api.storage import Checkpoint
from tempflow_api.v1alpha1 import JobSpec

START_SECONDS = 300.0
"""For a node, the image and the interpreter."""
_POLL_SECONDS = 0.5


@contextmanager
def reader(
    connection: Connection,
    spec: JobSpec,
    store: Checkpoint,
    *,
    namespace: str,
    image: str,
    owner: Raw | None = None,
    give_up_seconds: float | None,
    on_start: Callable[[str], None] = lambda _name: None,
) -> Iterator[RemoteFiles]:
    """The files below ``store.uri``, through a pod like those of the job ``spec`` describes.

    Raises Forbidden without the rights for it, WaitTimeout and ClusterError when the pod does not
    start.
    """
    _sweep(connection, namespace, owner)
    body = reader_pod.manifest(spec, store, image, owner)
    with _rights():
        made = connection.send("POST", PODS.path(namespace), what="a reader pod", body=body)
    pod = _Pod(connection, namespace, str(made["metadata"]["name"]))
    try:
        on_start(f"{namespace}/{pod.name}")
        root = (store.uri or "").removeprefix("s3://")
        files = RemoteFiles(root, pod.tunnel, pod.still_there, give_up_seconds)
        pod.wait(files, START_SECONDS)
        yield files
    finally:
        pod.remove()


@contextmanager
def _rights() -> Iterator[None]:
    """Whom to ask; a quota or Pod Security that refuses the pod says so itself."""
    try:
        yield
    except Forbidden as error:
        said = str(error).partition(". Ask for")[0]
        remedy = ". Ask for the role tempflow-via-cluster in that namespace"
        raise Forbidden(said + (remedy if " cannot " in said else ""), error.code) from error


class _Pod:
    """A reader that was created."""

    def __init__(self, connection: Connection, namespace: str, name: str) -> None:
        self._connection, self._namespace, self.name = connection, namespace, name
        self._what = f"reader pod {namespace}/{name}"
        self._path = PODS.path(namespace, name)

    def tunnel(self) -> Tunnel:
        with _rights():
            return self._connection.port(
                self._namespace, self.name, naming.READER_PORT, what=self._what
            )

    def still_there(self) -> None:
        """Raises ClusterError when it has ended; an API server that is away says nothing of it."""
        try:
            self._look()
        except ClusterError as error:
            if not passes(error):
                raise

    def _look(self) -> Raw:
        try:
            pod = self._connection.send("GET", self._path, what=self._what)
        except NotFound as error:
            raise ClusterError(_over(self._what, "somebody has deleted it")) from error
        why = reader_pod.ended(pod)
        if why:
            raise ClusterError(_over(self._what, why))
        return pod

    def wait(self, files: RemoteFiles, seconds: float) -> None:
        """Until it answers."""
        until = time.monotonic() + seconds
        state = "it is starting"
        while time.monotonic() < until:
            try:
                pod = self._look()
                refused = reader_pod.refused(pod)
                if refused:
                    raise ClusterError(f"{self._what}: {refused}")
                state = reader_pod.waits_for(pod)
                if reader_pod.runs(pod):
                    state = "it runs, and does not answer"
                    files.ready()
                    return
            except ClusterError as error:
                if not passes(error):
                    raise
            time.sleep(_POLL_SECONDS)
        raise WaitTimeout(f"{self._what}: not ready after {seconds:.0f} s: {state}")

    def remove(self) -> None:
        """Nothing is raised: it ends by itself when nobody asks it."""
        with suppress(ClusterError):
            self._connection.send("DELETE", self._path, what=self._what)


def _sweep(connection: Connection, namespace: str, owner: Raw | None) -> None:
    """Readers of the job that have ended, and whose maker could not delete them."""
    selector = ",".join(f"{key}={value}" for key, value in reader_pod.labels(owner).items())
    query = {"labelSelector": selector}
    found, _ = every(connection, PODS.path(namespace), query, what="reader pods")
    for pod in found:
        if reader_pod.ended(pod):
            _Pod(connection, namespace, pod["metadata"]["name"]).remove()


def _over(what: str, why: str) -> str:
    missing = f"No module named '{naming.READER_MODULE}'" in why
    remedy = (
        "its image is older than this command: name a newer one with --image"
        if missing
        else "give the command again; a pull goes on where it broke off"
    )
    return f"{what} has ended ({why}): {remedy}"
