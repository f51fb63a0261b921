"""A real S3 server for pods and tests: SeaweedFS, on the bridge, with signatures checked.

Only the S3 port listens on the bridge; the servers behind it, which check nothing, are on loopback.
"""

import hashlib
import hmac
import json
import secrets
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlencode

from tests.cluster.layout import BRIDGE_ADDRESS, LOOPBACK, S3_PORT, StateFolder
from tests.cluster.network import check_port_free
from tests.cluster.processes import Ledger
from tests.cluster.waiting import wait_for

REGION = "us-east-1"
_DAEMON = "s3"
# The one object that is ours and not a test's.
_CANARY_BUCKET = "tempflow-test-canary"
_CANARY = f"/{_CANARY_BUCKET}/canary"
# Each of the servers also listens on a port for its own protocol.
_INNER_PORTS = {
    "master.port": 12933,
    "master.port.grpc": 12934,
    "volume.port": 12935,
    "volume.port.grpc": 12936,
    "filer.port": 12937,
    "filer.port.grpc": 12938,
    "s3.port.grpc": 12939,
}


class Keys(NamedTuple):
    access_key: str
    secret_key: str


@dataclass(frozen=True)
class S3Server:
    """One server beside a cluster, and in its ledger: `down` ends it too."""

    state: StateFolder
    program: Path
    access_key: str
    secret_key: str
    user: "Keys"
    """Of somebody who reads and writes, but to whom a bucket that is missing stays missing: for an
    administrator the server makes it."""

    @property
    def _ledger(self) -> Ledger:
        # Read anew each time: the cluster's own daemons come and go meanwhile.
        return Ledger.read(self.state)

    @property
    def endpoint(self) -> str:
        """The address for pods and for this machine alike."""
        return f"http://{BRIDGE_ADDRESS}:{S3_PORT}"

    def start(self) -> None:
        """Start it and wait until it answers a signed request; earlier data is still there."""
        ledger = self._ledger
        if ledger.running(_DAEMON):
            return
        for option, port in _INNER_PORTS.items():
            check_port_free(LOOPBACK, port, f"S3's {option}")
        check_port_free(BRIDGE_ADDRESS, S3_PORT, "S3")
        (self.state.s3 / "data").mkdir(parents=True, exist_ok=True)
        ledger.start(_DAEMON, [self.program, *_arguments(self.state.s3)])

        def answers() -> bool:
            ledger.must_run(_DAEMON)
            return self._keeps_objects()

        # After a kill it takes 15 s: the dead server's own registration has to time out first.
        wait_for("an answer of the S3 server", answers, deadline_seconds=90)

    def _keeps_objects(self) -> bool:
        """Whether objects, those of an earlier start too, can be read and written."""
        # Buckets are listed seconds before the server that holds the objects is back: look at one.
        self._status("PUT", f"/{_CANARY_BUCKET}")
        readable = self._status("GET", _CANARY) in (200, 404)
        # With content: an empty object has nothing on the server that holds objects.
        return readable and self._status("PUT", _CANARY, b"canary") == 200

    def _status(self, method: str, path: str, body: bytes | None = None) -> int:
        return request(method, self.presigned_url(method, path), body)[0]

    def stop(self) -> None:
        """End it in order, which takes it 15 s."""
        self._ledger.end(_DAEMON, grace_seconds=30)
        remove_sockets()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._ledger.end(_DAEMON, grace_seconds=0)
        remove_sockets()

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket; one that exists is fine."""

        def created() -> bool:
            return self._status("PUT", f"/{bucket}") in (200, 409)

        wait_for(f"bucket {bucket}", created, deadline_seconds=30)

    def presigned_url(self, method: str, path: str, *, valid_seconds: int = 3600) -> str:
        """An URL that carries its own signature, for `/bucket/key`: plain HTTP clients can use it.

        AWS Signature Version 4 in the query string, with an unsigned payload.
        """
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        scope = f"{now[:8]}/{REGION}/s3/aws4_request"
        host = self.endpoint.removeprefix("http://")
        query = urlencode(
            {
                "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
                "X-Amz-Credential": f"{self.access_key}/{scope}",
                "X-Amz-Date": now,
                "X-Amz-Expires": valid_seconds,
                "X-Amz-SignedHeaders": "host",
            },
            quote_via=quote,
            safe="",
        )
        canonical = f"{method}\n{quote(path)}\n{query}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        key = f"AWS4{self.secret_key}".encode()
        for part in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}"):
            key = hmac.digest(key, part.encode(), "sha256")
        return f"{self.endpoint}{quote(path)}?{query}&X-Amz-Signature={key.hex()}"


def server(state: StateFolder, program: Path) -> S3Server:
    """The cluster's S3 server, not started; its keys are made once and kept."""
    state.s3.mkdir(parents=True, mode=0o700, exist_ok=True)
    config = _identities(state.s3)
    if not config.exists():
        work = ["Read", "Write", "List", "Tagging"]
        identities = [
            _identity("tempflow-test", ["Admin", *work]),
            _identity("tempflow-user", work),
        ]
        config.touch(mode=0o600)
        config.write_text(json.dumps({"identities": identities}))
    admin, user = (
        Keys(identity["credentials"][0]["accessKey"], identity["credentials"][0]["secretKey"])
        for identity in json.loads(config.read_text())["identities"]
    )
    return S3Server(state, program, admin.access_key, admin.secret_key, user)


def _identity(name: str, actions: list[str]) -> dict[str, object]:
    keys = {"accessKey": secrets.token_hex(8), "secretKey": secrets.token_hex(16)}
    return {"name": name, "credentials": [keys], "actions": actions}


def request(method: str, url: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and content; status 0 when nothing answers."""
    # Not through a proxy: the bridge is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, body, method=method), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def remove_sockets() -> None:
    """Remove the sockets that an ended server leaves in a place that it does not let us choose."""
    for option, port in _INNER_PORTS.items():
        if option.endswith(".grpc"):
            server_name = option.partition(".")[0]
            Path(f"/tmp/seaweedfs-{server_name}-grpc-{port}.sock").unlink(missing_ok=True)


def _identities(folder: Path) -> Path:
    return folder / "identities.json"


def _arguments(folder: Path) -> list[str]:
    return [
        *(
            "-logtostderr=true",
            "server",
            f"-dir={folder / 'data'}",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
        ),
        *(f"-{option}={port}" for option, port in _INNER_PORTS.items()),
        *("-filer", f"-filer.localSocket={folder / 'filer.sock'}"),
        *("-s3", f"-s3.ip.bind={BRIDGE_ADDRESS}", f"-s3.port={S3_PORT}"),
        *(f"-s3.config={_identities(folder)}", f"-s3.localSocket={folder / 's3.sock'}"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
        # A bucket takes seven volumes, and there are as many as fit onto the disk, by this size.
        *("-volume.max=0", "-master.volumeSizeLimitMB=128"),
        "-volume.preStopSeconds=0",  # nobody is left who would have to notice the end first
        "-master.telemetry=false",  # tests tell nobody that they ran
    ]
