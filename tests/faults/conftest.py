"""S3 servers of two makers, each behind the proxy that breaks things."""

import os
import uuid
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.faults.s3_proxy import Proxy, proxy

BUCKET = "runs"


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[None]:
    """For this process and for those that it forks."""
    given = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testtest",
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
def session_proxy(moto_endpoint: str, s3_environment: None) -> Iterator[Proxy]:
    del s3_environment
    boto3.client("s3", endpoint_url=moto_endpoint).create_bucket(Bucket=BUCKET)
    with proxy(moto_endpoint) as running:
        yield running


@pytest.fixture
def s3(session_proxy: Proxy) -> Iterator[Proxy]:
    """The proxy, without faults."""
    session_proxy.clear()
    yield session_proxy
    session_proxy.clear()


@pytest.fixture
def uri() -> str:
    """Where a run lies."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
