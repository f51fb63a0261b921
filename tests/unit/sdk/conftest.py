"""A stored run, in a folder, in S3 over HTTP, and behind a reader as in a pod."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tempflow.checkpoints import Store, open_store
from tempflow.cluster.errors import Unreachable
from tempflow.cluster.remote_files import RemoteFiles
from tempflow_trainer.reader import Reader
from tempflow_trainer.store import FolderStore
from tests.unit.sdk import stored_runs

Put = Callable[[str, bytes | None], None]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.resource("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    made = client.create_bucket(Bucket="bucket")
    yield made
    made.objects.all().delete()
    made.delete()


@pytest.fixture(params=["folder", "s3"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Put]:
    """A stored run, and a function that writes (or, given None, deletes) a file of it."""
    return store_in(request.param, request, tmp_path)


def store_in(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Put]:
    if kind in ("folder", "reader"):

        def put(path: str, content: bytes | None) -> None:
            target = tmp_path / "runs/demo" / path
            if content is None:
                target.unlink()
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

        store = open_store(str(tmp_path / "runs/demo"))
        if kind == "reader":
            store = Store(remote(reading(tmp_path / "runs/demo", request)), "bucket/demo", "s3://x")
    else:
        endpoint = request.getfixturevalue("s3_endpoint")
        bucket = request.getfixturevalue("bucket")

        def put(path: str, content: bytes | None) -> None:
            entry = bucket.Object(f"runs/demo/{path}")
            if content is None:
                entry.delete()
            else:
                entry.put(Body=content)

        store = open_store("s3://bucket/runs/demo", endpoint)
    for path, content in stored_runs.run().items():
        put(path, content)
    return store, put


def reading(folder: Path, request: pytest.FixtureRequest) -> Reader:
    """A reader of the folder, until the test ends."""
    reader = Reader(FolderStore(folder), port=0)
    thread = threading.Thread(target=reader.serve)
    thread.start()

    def end() -> None:
        reader.stop()
        thread.join()

    request.addfinalizer(end)
    return reader


def remote(
    reader: Reader, still_there: Callable[[], None] = lambda: None, give_up_seconds: float = 10
) -> RemoteFiles:
    """What a client sees of it, by plain connections in place of tunnels."""

    def connect() -> Any:
        try:
            return socket.create_connection(("127.0.0.1", reader.port))
        except OSError as error:
            raise Unreachable("refused") from error

    return RemoteFiles("bucket/demo", connect, still_there, give_up_seconds)
