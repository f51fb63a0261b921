"""The cluster's network: a bridge, node 2's namespace, routes; and undoing all of it."""

import errno
import ipaddress
import json
import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cluster import mounts
from tests.cluster.errors import ClusterError
from tests.cluster.layout import (
    BRIDGE,
    BRIDGE_ADDRESS,
    BRIDGE_PREFIX_BITS,
    CLUSTER_RANGE,
    NODE_1,
    NODE_2,
    NODE_LINK,
    POD_BRIDGE,
    SERVICE_RANGE,
)
from tests.cluster.processes import Ledger

# Settings of the whole machine that we or a kubelet change; `down` puts the old values back.
_SYSCTLS = (
    "net/ipv4/ip_forward",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
_PROXY_TABLES = (("ip", "kube-proxy"), ("ip6", "kube-proxy"))


def bridge_owner() -> Path | None:
    """The state folder of the test cluster that is up on this machine, if one is."""
    for link in _json("ip", "-json", "link", "show"):
        if link["ifname"] == BRIDGE:
            return Path(link.get("ifalias", "unknown"))
    return None


def check_range_free() -> None:
    """ClusterError when the machine already routes to a part of the cluster's range."""
    ours = ipaddress.ip_network(CLUSTER_RANGE)
    for route in _json("ip", "-json", "-4", "route", "show", "table", "all"):
        if route["dst"] == "default" or route.get("dev") in (BRIDGE, POD_BRIDGE):
            continue
        if ipaddress.ip_network(route["dst"], strict=False).overlaps(ours):
            where = f"{route['dst']} on {route.get('dev', 'another route')}"
            raise ClusterError(f"{CLUSTER_RANGE} is taken on this machine: it routes {where}")


def check_port_free(address: str, port: int, needed_by: str) -> None:
    """ClusterError when something listens on that port of that address, or of all addresses."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # IP_FREEBIND (ip(7), 15): the bridge's address can be tried before there is a bridge.
        probe.setsockopt(socket.IPPROTO_IP, 15, 1)
        try:
            probe.bind((address, port))
            probe.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            taken = f"port {port} of {address} is in use: {needed_by} needs it"
            raise ClusterError(taken) from None


def create(ledger: Ledger) -> None:
    """Bridge, node 2's namespace and the routes between the two."""
    ledger.sysctls_before = {name: _sysctl(name).read_text().strip() for name in _SYSCTLS}
    ledger.write()
    _sysctl("net/ipv4/ip_forward").write_text("1")
    prefix = f"/{BRIDGE_PREFIX_BITS}"
    namespace = str(NODE_2.namespace)
    # The alias says whose bridge it is: another checkout's `up` reads it.
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("link", "set", BRIDGE, "alias", str(ledger.state.root))
    _ip("address", "add", BRIDGE_ADDRESS + prefix, "dev", BRIDGE)
    _ip("link", "set", BRIDGE, "up")
    _ip("netns", "add", namespace)
    _ip("link", "add", NODE_LINK, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("link", "set", NODE_LINK, "master", BRIDGE, "up")
    inside = ("-netns", namespace)
    _ip(*inside, "link", "set", "lo", "up")
    _ip(*inside, "address", "add", NODE_2.address + prefix, "dev", "eth0")
    _ip(*inside, "link", "set", "eth0", "up")
    # The whole range and no default route: nothing in node 2 gets out of the test network.
    _ip(*inside, "route", "add", CLUSTER_RANGE, "via", NODE_1.address)
    _run("nsenter", f"--net=/run/netns/{namespace}", "sysctl", "-qw", "net.ipv4.ip_forward=1")
    _ip("route", "add", NODE_2.pod_range, "via", NODE_2.address)
    # Without it the machine's own calls to services would leave by its default route.
    _ip("route", "add", SERVICE_RANGE, "dev", BRIDGE, "src", BRIDGE_ADDRESS)


def remove(ledger: Ledger) -> None:
    """Undo `create` and what kube-proxy and CNI added; whatever is gone already is passed over."""
    namespace = NODE_2.namespace
    if Path(f"/run/netns/{namespace}").exists():
        _ip("netns", "delete", str(namespace))
    present = {link["ifname"] for link in _json("ip", "-json", "link", "show")}
    for name in (NODE_LINK, POD_BRIDGE, BRIDGE):
        if name in present:
            _ip("link", "delete", name)
    for family, table in _PROXY_TABLES:
        if _quiet("nft", "list", "table", family, table):
            _run("nft", "delete", "table", family, table)
    for name, value in ledger.sysctls_before.items():
        _sysctl(name).write_text(value)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder with the empty ones in it; what somebody else put there since then stays."""
    if folder in mounts.mount_points() and not any(folder.iterdir()):
        mounts.unmount(folder)  # `ip netns add` mounts its folder on itself
    for inner, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            Path(inner).rmdir()


def free_bytes(folder: Path) -> int:
    """Free disk space where that folder is or would be."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _sysctl(name: str) -> Path:
    return Path("/proc/sys") / name


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _json(*command: str) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = json.loads(_run(*command) or "[]")
    return parsed


def _quiet(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
