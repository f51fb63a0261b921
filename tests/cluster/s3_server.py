"""A real S3 server of our own: SeaweedFS, on the bridge, with signatures checked.

Only the S3 port listens on the bridge; the servers behind it, which check nothing, are on loopback.
"""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.layout import BRIDGE_ADDRESS, LOOPBACK, S3_PORT, StateFolder
from tests.cluster.network import check_port_free
from tests.cluster.processes import Ledger
from tests.cluster.s3 import S3, Keys
from tests.cluster.waiting import wait_for

ENDPOINT = f"http://{BRIDGE_ADDRESS}:{S3_PORT}"  # for pods and for this machine alike
BUCKET = "tempflow"
_DAEMON = "s3"
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


@dataclass(frozen=True)
class S3Server:
    """One server beside a cluster, and in its ledger: `down` ends it too."""

    state: StateFolder
    program: Path
    admin: S3
    store: S3
    """As somebody sees it who reads and writes, but to whom a bucket that is missing stays missing:
    for an administrator the server makes it."""

    @property
    def _ledger(self) -> Ledger:
        # Read anew each time: the cluster's own daemons come and go meanwhile.
        return Ledger.read(self.state)

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
        self.admin.create_bucket()
        # Buckets are listed seconds before the server that holds the objects is back: look at one.
        readable = self.store.get("canary")[0] in (200, 404)
        # With content: an empty object has nothing on the server that holds objects.
        return readable and self.store.put("canary", b"canary")[0] == 200

    def stop(self) -> None:
        """End it in order, which takes it 15 s."""
        self._ledger.end(_DAEMON, grace_seconds=30)
        remove_sockets()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._ledger.end(_DAEMON, grace_seconds=0)
        remove_sockets()


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
    return S3Server(state, program, S3(ENDPOINT, BUCKET, admin), S3(ENDPOINT, BUCKET, user))


def _identity(name: str, actions: list[str]) -> dict[str, object]:
    keys = {"accessKey": secrets.token_hex(8), "secretKey": secrets.token_hex(16)}
    return {"name": name, "credentials": [keys], "actions": actions}


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
