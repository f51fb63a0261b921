"""A stored run, in a folder and in S3 over HTTP."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tempflow.checkpoints import Store, open_store
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
    if request.param == "folder":

        def put(path: str, content: bytes | None) -> None:
            target = tmp_path / "runs/demo" / path
            if content is None:
                target.unlink()
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

        store = open_store(str(tmp_path / "runs/demo"))
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
