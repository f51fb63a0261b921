"""What tests need of an S3 server, whoever runs it: a bucket, read and written from this machine.

By URLs that carry their own signature, which plain HTTP clients can use, in pods too.
"""

import urllib.error
import urllib.request
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import boto3
from botocore.config import Config

REGION = "us-east-1"


class Keys(NamedTuple):
    access_key: str
    secret_key: str
    session_token: str | None = None


@dataclass(frozen=True)
class S3:
    """A folder of a bucket, as the holder of these keys sees it."""

    endpoint: str
    """The address for pods and for this machine alike."""
    bucket: str
    keys: Keys = field(repr=False)
    folder: str = "tests"
    region: str = REGION

    def uri(self, path: str) -> str:
        return f"s3://{self.bucket}/{self.folder}/{path}"

    def presigned_url(self, operation: str, path: str) -> str:
        """An URL for `get_object` or `put_object`, good for an hour."""
        return self._signed(operation, Key=f"{self.folder}/{path}")

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and content; status 0 when nothing answers."""
        return request("GET", self.presigned_url("get_object", path))

    def put(self, path: str, body: bytes) -> tuple[int, bytes]:
        return request("PUT", self.presigned_url("put_object", path), body)

    def create_bucket(self) -> int:
        """The status: 200, or 409 when it is there already."""
        return request("PUT", self._signed("create_bucket"))[0]

    def remove_folder(self) -> None:
        """Delete all that the folder holds."""
        client = _client(self)
        pages = client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=f"{self.folder}/"):
            for found in page.get("Contents", ()):
                client.delete_object(Bucket=self.bucket, Key=found["Key"])

    def _signed(self, operation: str, **what: str) -> str:
        parameters = {"Bucket": self.bucket, **what}
        return str(_client(self).generate_presigned_url(operation, parameters))


@cache
def _client(s3: S3) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name=s3.region,
        aws_access_key_id=s3.keys.access_key,
        aws_secret_access_key=s3.keys.secret_key,
        aws_session_token=s3.keys.session_token,
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, proxies={}),
    )


def request(method: str, url: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and content; status 0 when nothing answers."""
    # Not through a proxy: our own server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, body, method=method), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""
