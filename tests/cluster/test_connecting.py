"""Ways to a cluster: contexts, login plugins, a pod's service account, proxies."""

import json
import select
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from kubernetes.config import incluster_config

from tempflow import Client, Unauthorized, Unreachable
from tempflow.cluster import connection
from tests.cluster.apiserver import ApiServer
from tests.cluster.layout import LOOPBACK

pytestmark = pytest.mark.cluster


def edited(path: Path, user: Mapping[str, object], **context: object) -> str:
    """The kubeconfig with another user and context."""
    raw = yaml.safe_load(path.read_text())
    raw["users"][0]["user"] = dict(user)
    raw["contexts"][0]["context"].update(context)
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def plugin(folder: Path, body: str) -> dict[str, object]:
    """A login plugin that is a Python script."""
    script = folder / "login.py"
    script.write_text(body)
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(script)],
            "interactiveMode": "Never",
        }
    }


class TestContexts:
    def test_the_contexts_namespace_is_the_default(self, api: ApiServer) -> None:
        user = {"token": api.token("admin")}
        path = edited(api.kubeconfig("admin"), user, namespace="research")
        with Client(kubeconfig=path) as client:
            assert client.namespace == "research"
            assert list(client.list()) == []
        with Client(kubeconfig=path, context="admin", namespace="other") as client:
            assert client.namespace == "other"

    def test_the_environment_is_read_when_it_is_needed(
        self, api: ApiServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig("admin")))
        with Client() as client:
            client.list(all_namespaces=True)


class TestLoginPlugins:
    def test_one_that_works(self, api: ApiServer, tmp_path: Path) -> None:
        credential = {
            "apiVersion": "client.authentication.k8s.io/v1",
            "kind": "ExecCredential",
            "status": {"token": api.token("admin")},
        }
        user = plugin(tmp_path, f"print({json.dumps(json.dumps(credential))})")
        with Client(kubeconfig=edited(api.kubeconfig("admin"), user)) as client:
            client.list()

    def test_one_that_fails_is_told_as_such(self, api: ApiServer, tmp_path: Path) -> None:
        user = plugin(tmp_path, "raise SystemExit('please log in')")
        with pytest.raises(Unauthorized, match="login plugin of context 'admin'"):
            Client(kubeconfig=edited(api.kubeconfig("admin"), user))


def test_inside_a_pod(api: ApiServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the files that a kubelet puts there, and no kubeconfig."""
    mounted = tmp_path / "serviceaccount"
    mounted.mkdir()
    (mounted / "token").write_text(api.token("admin"))
    (mounted / "ca.crt").write_bytes(api.authority.read_bytes())
    (mounted / "namespace").write_text("research")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(mounted / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(mounted / "ca.crt"))
    monkeypatch.setattr(connection, "_POD_NAMESPACE", mounted / "namespace")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", LOOPBACK)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with Client() as client:
        assert client.namespace == "research"
        client.list()


class Proxy:
    """Joins a client and the server that it names with CONNECT, and counts."""

    def __init__(self) -> None:
        self.asked_for: list[str] = []
        self._server = socket.create_server((LOOPBACK, 0))
        self.url = f"http://{LOOPBACK}:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        target = client.recv(4096).split()[1].decode()
        self.asked_for.append(target)
        host, _, port = target.rpartition(":")
        with client, socket.create_connection((host, int(port))) as server:
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    (server if ready is client else client).sendall(data)


class TestProxies:
    @pytest.fixture
    def proxy(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
        for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        proxy = Proxy()
        yield proxy
        proxy.close()

    def test_of_the_environment(
        self, api: ApiServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with Client(kubeconfig=str(api.kubeconfig("admin"))) as client:
            client.list()
        assert proxy.asked_for == [f"{LOOPBACK}:{api.port}"]

    def test_no_proxy_goes_past_it(
        self, api: ApiServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", LOOPBACK)
        with Client(kubeconfig=str(api.kubeconfig("admin"))) as client:
            client.list()
        assert proxy.asked_for == []

    def test_of_the_kubeconfig(self, api: ApiServer, proxy: Proxy) -> None:
        path = api.kubeconfig("admin", **{"proxy-url": proxy.url})
        with Client(kubeconfig=str(path)) as client:
            client.list()
        assert len(proxy.asked_for) == 1

    def test_one_that_is_not_there(
        self, api: ApiServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proxy.close()
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        with (
            Client(kubeconfig=str(api.kubeconfig("admin"))) as client,
            pytest.raises(Unreachable),
        ):
            client.list()
