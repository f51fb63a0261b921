"""A second S3 server, of another maker: it checks signatures and keeps its data on disk."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from tests.cluster import build

START_SECONDS = 60
_ADMIN = {"accessKey": "admin", "secretKey": "adminadmin"}
_SERVERS = ("master", "volume", "filer", "s3")


@contextmanager
def seaweedfs(folder: Path, user: dict[str, str], bucket: str) -> Iterator[str]:
    """Its address, while the context lasts.

    Args:
        folder: for its data.
        user: keys of somebody who reads and writes, and for whom no bucket is made unasked.
        bucket: there from the start.
    """
    program = build.seaweedfs(lambda _text: None)
    work = ["Read", "Write", "List", "Tagging"]
    identities = [
        {"name": "admin", "credentials": [_ADMIN], "actions": ["Admin", *work]},
        {"name": "user", "credentials": [user], "actions": work},
    ]
    (folder / "identities.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir(exist_ok=True)
    ports = dict(zip((*_SERVERS, *(f"{s}.grpc" for s in _SERVERS)), free_ports(8), strict=True))
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, *_arguments(folder, ports)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        _wait(endpoint, bucket, process, log)
        yield endpoint
    finally:
        process.kill()
        process.wait()
        for server in _SERVERS:
            # It leaves them in a place that it does not let us choose.
            Path(f"/tmp/seaweedfs-{server}-grpc-{ports[f'{server}.grpc']}.sock").unlink(True)


def _arguments(folder: Path, ports: dict[str, int]) -> list[str]:
    return [
        *("-logtostderr=true", "server", f"-dir={folder / 'data'}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.ip.bind=127.0.0.1"),
        *(f"-{server}.port={ports[server]}" for server in _SERVERS),
        *(f"-{server}.port.grpc={ports[f'{server}.grpc']}" for server in _SERVERS),
        *("-filer", f"-filer.localSocket={folder / 'filer.sock'}"),
        *("-s3", f"-s3.config={folder / 'identities.json'}"),
        *(f"-s3.localSocket={folder / 's3.sock'}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-s3.iam=false", "-volume.max=0", "-master.volumeSizeLimitMB=1024"),
        *("-volume.preStopSeconds=0", "-master.telemetry=false"),
    ]


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait(endpoint: str, bucket: str, process: subprocess.Popen[bytes], log: Path) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=_ADMIN["accessKey"],
        aws_secret_access_key=_ADMIN["secretKey"],
    )
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            names = [found["Name"] for found in client.list_buckets()["Buckets"]]
            if bucket not in names:
                client.create_bucket(Bucket=bucket)
            # Buckets are served seconds before the server that holds the objects is there.
            client.put_object(Bucket=bucket, Key="canary", Body=b"canary")
            return
        except (BotoCoreError, ClientError):
            text = log.read_text(errors="replace")[-2000:]
            assert process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.2)
