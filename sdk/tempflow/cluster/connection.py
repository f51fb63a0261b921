"""One API server: where it is, who asks, single requests and streams of lines.

The only module that knows the Kubernetes client. That client brings what nobody should write
again: kubeconfigs with their login plugins, service accounts in pods, TLS, proxies. Objects stay
plain JSON; typed ones are made from it where they are handed out.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import urllib3
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config import (
    ConfigException,
    list_kube_config_contexts,
    load_incluster_config,
    load_kube_config,
)
from websocket import WebSocketBadStatusException, WebSocketException

from tempflow.cluster.errors import ClusterError, Silent, Unauthorized, Unreachable, refusal
from tempflow.cluster.tunnel import Tunnel, open_websocket
from tempflow_api import naming

Raw = dict[str, Any]

FIELD_MANAGER = "tempflow-cli"
JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"

CONNECT_SECONDS = 10.0
# An API server gives a request a minute.
READ_SECONDS = 65.0
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# Streams of all ranks of a large job are open at the same time.
_MOST_CONNECTIONS = 1100


@dataclass(frozen=True)
class Resource:
    """One kind of object, as its address spells it, and what people call one."""

    api: str
    plural: str
    word: str

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        scope = f"namespaces/{quote(namespace, safe='')}/" if namespace else ""
        parts = [self.api, f"{scope}{self.plural}", quote(name, safe=""), subresource]
        return "/" + "/".join(part for part in parts if part)


JOBS = Resource(f"apis/{naming.API_VERSION}", naming.PLURAL, "job")
BATCH_JOBS = Resource("apis/batch/v1", "jobs", "Job")
PODS = Resource("api/v1", "pods", "pod")
EVENTS = Resource("apis/events.k8s.io/v1", "events", "event")
CONFIG_MAPS = Resource("api/v1", "configmaps", "ConfigMap")


class Connection:
    """An API server as one user sees it. Raises ClusterError and its kinds, nothing else."""

    def __init__(self, settings: Configuration, namespace: str, server: str) -> None:
        settings.keep_alive = True  # or a stream whose peer is gone would be silent for ever
        settings.retries = False  # whoever can repeat a request does so knowingly
        settings.connection_pool_maxsize = _MOST_CONNECTIONS
        self._api = ApiClient(settings)
        self.namespace = namespace
        """Where objects are sought unless told."""
        self.server = server

    def close(self) -> None:
        self._api.rest_client.close()

    def send(
        self,
        method: str,
        path: str,
        *,
        what: str,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = JSON,
        accept: str = JSON,
        read_seconds: float = READ_SECONDS,
    ) -> Raw:
        """One request and its JSON; ``what`` names its object in errors."""
        with self._errors(what):
            response = self._open(
                method, path, query, body, content_type, accept, (CONNECT_SECONDS, read_seconds)
            )
            text = bytes(response.read())
        return _answer(response.status, text, what)

    def text(self, path: str, *, what: str) -> str:
        """The answer to a GET, as it is."""
        with self._errors(what):
            timeout = (CONNECT_SECONDS, READ_SECONDS)
            response = self._open("GET", path, None, None, JSON, "*/*", timeout)
            text = bytes(response.read())
        if response.status >= 400:
            raise _refused(response.status, text, what)
        return text.decode(errors="replace")

    @contextmanager
    def stream(
        self,
        path: str,
        query: Mapping[str, str],
        *,
        what: str,
        idle_seconds: float | None,
        with_rest: bool = False,
    ) -> Iterator[Iterator[bytes]]:
        """Lines of a GET as they arrive; what comes after the last line's end only if asked for.

        The iterator ends when the server ends the answer, and raises Unreachable when the
        connection breaks, of that Silent when it says nothing for ``idle_seconds``.
        """
        with self._errors(what):
            timeout = (CONNECT_SECONDS, idle_seconds)
            response = self._open("GET", path, query, None, JSON, "*/*", timeout)
            raw: urllib3.HTTPResponse = response.response
            if raw.status >= 400:
                raise _refused(raw.status, raw.data, what)
        try:
            yield self._lines(raw, what, with_rest=with_rest)
        finally:
            raw.close()

    def port(self, namespace: str, pod: str, number: int, *, what: str) -> Tunnel:
        """A new connection to a port of the pod, as ``kubectl port-forward`` has it."""
        path = PODS.path(namespace, pod, "portforward")
        _, url, headers, *_ = self._request("GET", path, {"ports": str(number)}, None, {})
        try:
            with self._errors(what):
                return Tunnel(open_websocket(self._api.configuration, url, headers, READ_SECONDS))
        except WebSocketBadStatusException as error:
            raise _refused(error.status_code, error.resp_body or b"", what) from error

    def _lines(self, raw: urllib3.HTTPResponse, what: str, *, with_rest: bool) -> Iterator[bytes]:
        rest = b""
        with self._errors(what):
            try:
                for block in raw.stream(1 << 16):
                    *whole, rest = (rest + block).split(b"\n")
                    yield from whole
            except urllib3.exceptions.ReadTimeoutError as error:
                raise Silent(
                    f"{what}: nothing comes any more from {self.server}: give the command again"
                ) from error
        if with_rest and rest:
            yield rest

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: object,
        content_type: str,
        accept: str,
        timeout: tuple[float, float | None],
    ) -> Any:
        headers = {"Accept": accept}
        if body is not None:
            headers["Content-Type"] = content_type
        call = self._request(method, path, query, body, headers)
        return self._api.call_api(*call, _request_timeout=timeout)  # type: ignore[misc]

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: object,
        headers: dict[str, str],
    ) -> tuple[Any, ...]:
        """Method, URL, headers with who asks, and body."""
        parameters = list((query or {}).items())
        if method in ("POST", "PUT", "PATCH"):
            parameters.append(("fieldManager", FIELD_MANAGER))
        return self._api.param_serialize(
            method,
            path,
            query_params=parameters,
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Unreachable for whatever keeps an answer from coming."""
        try:
            yield
        except ClusterError:
            raise
        except WebSocketBadStatusException:
            raise  # an answer
        except (urllib3.exceptions.HTTPError, OSError, ApiException, WebSocketException) as error:
            raise Unreachable(
                f"{what}: no answer from {self.server} ({_cause(error)}): is the cluster up, and "
                "the right --context chosen?"
            ) from error


def connect(
    *, kubeconfig: str | None = None, context: str | None = None, namespace: str | None = None
) -> Connection:
    """As kubectl finds it: the kubeconfig given or that of ``KUBECONFIG`` or ``~/.kube/config``,
    and inside a pod without one, the pod's service account.

    Raises Unreachable where there is no configuration, or no such context, and Unauthorized where
    a login plugin fails.
    """
    settings = Configuration()
    if kubeconfig is None and context is None and _in_pod_without_config():
        load_incluster_config(settings)  # type: ignore[no-untyped-call]  # no types
        own = _POD_NAMESPACE.read_text().strip() if _POD_NAMESPACE.exists() else "default"
        return Connection(settings, namespace or own, settings.host)
    # Not left to the client, which looks at the environment once, when it is imported.
    file = str(Path(kubeconfig).expanduser()) if kubeconfig else _default_kubeconfig()
    try:
        contexts, current = list_kube_config_contexts(file)  # type: ignore[no-untyped-call]
        chosen = _context(contexts, current, context)
        with _login_complaints() as complaints:
            load_kube_config(  # type: ignore[no-untyped-call]
                file, chosen["name"], client_configuration=settings, persist_config=False
            )
    except ConfigException as error:
        raise _no_configuration(error, file) from error
    except OSError as error:
        raise Unreachable(f"cannot read the kubeconfig: {error}") from error
    if complaints:
        raise Unauthorized(
            f"the login plugin of context {chosen['name']!r} gave no credentials "
            f"({complaints[0]}): log in to the cluster again, then repeat the command"
        )
    own = str(chosen.get("context", {}).get("namespace") or "default")
    return Connection(settings, namespace or own, settings.host)


@contextmanager
def _login_complaints() -> Iterator[list[str]]:
    """What the client logs meanwhile: a login plugin that fails is an error line there and no
    exception, and its user would go on as nobody."""
    said: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage().strip())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(handler)


def _in_pod_without_config() -> bool:
    if os.environ.get("KUBECONFIG") or (Path.home() / ".kube/config").exists():
        return False
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


def _context(contexts: Sequence[Raw], current: Raw | None, wanted: str | None) -> Raw:
    if wanted is None:
        if current is None:
            raise ConfigException("no current context is set")
        return current
    for context in contexts:
        if context["name"] == wanted:
            return context
    names = ", ".join(sorted(context["name"] for context in contexts))
    raise ConfigException(f"there is no context {wanted!r}; there are: {names}")


def _default_kubeconfig() -> str:
    return os.environ.get("KUBECONFIG") or str(Path.home() / ".kube/config")


def _no_configuration(error: Exception, file: str) -> Unreachable:
    why = str(error).splitlines()[0].rstrip(".")
    return Unreachable(
        f"no usable cluster configuration in {file}: {why}. Set KUBECONFIG to a kubeconfig, or "
        "name one with --kubeconfig"
    )


def _answer(code: int, text: bytes, what: str) -> Raw:
    if code >= 400:
        raise _refused(code, text, what)
    try:
        answer: Raw = json.loads(text)
    except ValueError as error:
        start = text[:80].decode(errors="replace")
        raise ClusterError(f"{what}: the answer is not JSON: {start!r}", code) from error
    return answer


def _refused(code: int, text: bytes, what: str) -> ClusterError:
    try:
        status = json.loads(text)
    except ValueError:
        status = {"message": text[:200].decode(errors="replace")}
    return refusal(code, status if isinstance(status, dict) else {}, what=what)


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line: the outer ones only say that a request failed."""
    reason: BaseException = error
    for _ in range(5):
        inner = getattr(reason, "reason", None) or reason.__cause__
        if not isinstance(inner, BaseException):
            break
        reason = inner
    text = str(reason) or type(reason).__name__
    return text.splitlines()[-1].rpartition(": ")[2][:200]
