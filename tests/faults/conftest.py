"""S3 servers of two makers, each behind the proxy that breaks things."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tempflow_api.errors import ExitCode
from tests.faults.held_writer import requests_of_a_save
from tests.faults.s3_proxy import Proxy, Seen, proxy
from tests.faults.seaweedfs import seaweedfs
from tests.faults.trainer_run import Run, finish

BUCKET = "runs"


KEYS = {"accessKey": "test", "secretKey": "testtest"}


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[None]:
    """For this process and for those that it forks."""
    given = {
        "AWS_ACCESS_KEY_ID": KEYS["accessKey"],
        "AWS_SECRET_ACCESS_KEY": KEYS["secretKey"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    yield
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def moto(s3_environment: None) -> Iterator[Proxy]:
    """A server that checks little and starts at once."""
    del s3_environment
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    endpoint = f"http://127.0.0.1:{port}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
    with proxy(endpoint) as running:
        yield running
    server.stop()


@pytest.fixture(scope="session")
def seaweed(s3_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A server of another maker, which checks signatures and keeps its data on disk."""
    del s3_environment
    folder = tmp_path_factory.mktemp("seaweedfs")
    with seaweedfs(folder, KEYS, BUCKET) as endpoint, proxy(endpoint) as running:
        yield running


@pytest.fixture
def s3(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """The proxy in front of one of them, without faults."""
    running: Proxy = request.getfixturevalue(getattr(request, "param", "moto"))
    running.clear()
    yield running
    running.clear()


@pytest.fixture
def uri() -> str:
    """Where a run lies."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def run(s3: Proxy, tmp_path: Path) -> Run:
    """A run in a store without faults, not started."""
    return Run(tmp_path, s3)


@pytest.fixture(scope="session")
def undisturbed(moto: Proxy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The result of a run that is left alone."""
    moto.clear()
    run = Run(tmp_path_factory.mktemp("undisturbed"), moto)
    code, output = finish(run.start())
    assert code == ExitCode.DONE, output
    assert run.committed() == [1, 2, 3, 4]
    found = run.result()
    assert {f"epoch-{epoch:06d}.png" for epoch in (0, 2, 4)} < found.keys()
    return found


@pytest.fixture(scope="session")
def save(moto: Proxy, tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """The requests of one undisturbed save."""
    moto.clear()
    uri = "s3://runs/undisturbed"
    return requests_of_a_save(moto, uri, tmp_path_factory.mktemp("undisturbed"))
