"""Who asks the store, and whom it believes: a private certificate authority, a web identity."""

import base64
import json
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tempflow_api.errors import StoreUnavailable
from tempflow_api.storage import Checkpoint
from tempflow_trainer.store import open_store
from tempflow_trainer.store_base import StoreSilent

Environ = dict[str, Any]


def certificate(folder: Path) -> tuple[Path, Path]:
    """Of an authority for itself, for 127.0.0.1; and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority of our own")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "authority.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


class Watched:
    """An S3 and an STS behind TLS, which notes who asks."""

    def __init__(self, folder: Path) -> None:
        self.authority, key = certificate(folder)
        self.asked: list[tuple[str, str]] = []
        self._moto = DomainDispatcherApplication(create_backend_app)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.authority, key)
        self._server = make_server("127.0.0.1", 0, self._note, threaded=True, ssl_context=context)
        self.endpoint = f"https://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _note(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        self.asked.append((environ["PATH_INFO"], environ.get("HTTP_AUTHORIZATION", "")))
        answer: Iterable[bytes] = self._moto(environ, start)
        return answer

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = Watched(tmp_path)
    maker = boto3.client("s3", endpoint_url=server.endpoint, verify=str(server.authority))
    maker.create_bucket(Bucket="runs")
    server.asked.clear()
    yield server
    server.close()


def stored(server: Watched) -> Checkpoint:
    return Checkpoint(uri="s3://runs/here", endpoint_url=server.endpoint)


def test_a_private_authority_is_believed_when_it_is_named(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreUnavailable, match="in AWS_CA_BUNDLE") as caught:
        open_store(stored(watched), "demo", tmp_path).probe()
    assert not isinstance(caught.value, StoreSilent)  # waiting would not help
    assert not watched.asked
    monkeypatch.setenv("AWS_CA_BUNDLE", str(watched.authority))
    open_store(stored(watched), "demo", tmp_path).probe()
    assert all(path.startswith("/runs") for path, _ in watched.asked)  # addressed by path
    assert all("Credential=mine/" in asker for _, asker in watched.asked)


def test_a_web_identity_becomes_keys_that_last_a_while(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster whose ServiceAccount stands for a role."""
    token = tmp_path / "token"
    parts = ({"alg": "none"}, {"sub": "system:serviceaccount:default:trainer"})
    encoded = [base64.urlsafe_b64encode(json.dumps(p).encode()).decode() for p in parts]
    token.write_text(".".join([*encoded, "x"]))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(watched.authority))
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", watched.endpoint)
    open_store(stored(watched), "demo", tmp_path).probe()
    (first, unsigned), *others = watched.asked
    assert (first, unsigned) == ("/", "")  # the exchange itself
    assert len(others) > 3
    assert all("Credential=ASIA" in asker for _, asker in others)
