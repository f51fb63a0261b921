"""A store of each kind: a folder, and S3 as moto serves it on this machine."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tempflow_trainer.store import FolderStore, S3Store
from tempflow_trainer.store_base import Store

BUCKET = "runs"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_PROFILE", raising=False)


@pytest.fixture
def s3_client(s3_endpoint: str, request: pytest.FixtureRequest) -> Any:
    request.getfixturevalue("credentials")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket=BUCKET)
    return client


@pytest.fixture(params=["folder", "s3"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Store]:
    """Makes the store of a run, by the name of its folder."""
    if request.param == "folder":
        return lambda name: FolderStore(tmp_path / "store" / name)
    request.getfixturevalue("s3_client")
    endpoint = request.getfixturevalue("s3_endpoint")
    place = f"s3://{BUCKET}/{tmp_path.name}"
    return lambda name: S3Store(f"{place}/{name}", endpoint_url=endpoint, region="us-east-1")


@pytest.fixture
def store(new_store: Callable[[str], Store]) -> Store:
    return new_store("run")
