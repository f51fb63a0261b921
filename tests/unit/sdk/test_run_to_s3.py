"""`tempflow run` with the real trainer and a store over HTTP, from two machines."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from tempflow_api.errors import ExitCode
from tests.wheels import sha256, wheel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
RUN = "s3://bucket/runs/away"
WHEEL = "s3://bucket/wheels/my_rewards-1.0-py3-none-any.whl"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a store with one empty bucket, and credentials for it in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    address = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket="bucket")
    yield address
    server.stop()


def manifest(folder: Path, endpoint: str, bucket: str = "bucket") -> Path:
    content = yaml.safe_load((ROOT / "examples/digits.yaml").read_text())
    content["metadata"]["name"] = "away"
    spec = content["spec"]
    spec["algorithm"] |= {"epochs": 2, "promptsPerEpoch": 4, "seedsPerPrompt": 1}
    spec["evaluation"] = {"everyEpochs": 100, "steps": 4, "prompts": 2, "imagesPerPrompt": 2}
    spec["checkpoint"] = {
        "uri": f"s3://{bucket}/runs",
        "endpointUrl": endpoint,
        "region": "us-east-1",
        "everyEpochs": 1,
    }
    spec["packages"] = [{"uri": WHEEL, "sha256": sha256(wheel())}]
    spec["rewards"].append({"name": "warmth", "weight": 0.1})
    spec["compute"] |= {"processesPerNode": 1}
    path = folder / "away.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def bring_a_reward(endpoint: str) -> None:
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    bucket, _, key = WHEEL.removeprefix("s3://").partition("/")
    client.put_object(Bucket=bucket, Key=key, Body=wheel())


def tempflow(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tempflow", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ),
        check=False,
    )


def test_a_run_continues_on_another_machine_and_its_result_is_pulled(
    store: str, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    bring_a_reward(store)
    first = tempflow(here, "run", str(manifest(here, store)))
    assert first.returncode == 0, first.stderr
    assert "warmth" in (here / "runs/away/record/metrics.jsonl").read_text()
    longer = ("--set", "spec.algorithm.epochs=3")
    second = tempflow(there, "run", str(manifest(there, store)), *longer)
    assert second.returncode == 0, second.stderr
    lines = (there / "runs/away/record/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3, "the record of the first machine was not fetched, or an epoch repeated"
    pulled = tempflow(there, "pull", RUN, "--endpoint-url", store, "--to", "result")
    assert pulled.returncode == 0, pulled.stderr
    (weights,) = (there / "result/adapter").iterdir()
    assert weights.stat().st_size > 10_000


def test_a_bucket_that_is_missing_is_named_and_not_made(store: str, tmp_path: Path) -> None:
    bring_a_reward(store)
    refused = tempflow(tmp_path, "run", str(manifest(tmp_path, store, bucket="absent")))
    assert refused.returncode == ExitCode.STORE
    assert "absent" in refused.stderr + refused.stdout
    assert "Traceback" not in refused.stderr + refused.stdout
    names = boto3.client("s3", endpoint_url=store, region_name="us-east-1").list_buckets()
    assert "absent" not in [bucket["Name"] for bucket in names["Buckets"]]
