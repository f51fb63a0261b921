"""The operator as a process of its own beside the control plane, and what it uses."""

import os
import subprocess
import sys
import threading
import time
import urllib.request

import psutil

from tests.cluster import bare
from tests.cluster.bare import Bare
from tests.cluster.errors import ClusterError
from tests.cluster.layout import LOOPBACK
from tests.cluster.waiting import wait_for

_SAMPLE_SECONDS = 0.2
# The control plane shares its processors with all that loads it, and answers late at times.
_LEASE_SECONDS = 60


class OperatorProcess:
    """One with its default settings, but for a longer Lease; started by the constructor."""

    def __init__(self, server: Bare) -> None:
        self._port = bare.free_ports(1)[0]
        self.started = time.monotonic()
        self._log = server.folder / "operator.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tempflow_operator.main"],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "KUBECONFIG": str(server.kubectl.kubeconfig),
                    "TEMPFLOW_HTTP_PORT": str(self._port),
                    "TEMPFLOW_LEASE_SECONDS": str(_LEASE_SECONDS),
                },
            )
        self._usage = psutil.Process(self._process.pid)
        self.peak_bytes = 0
        self._over = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes())

    def resident_bytes(self) -> int:
        try:
            return int(self._usage.memory_info().rss)
        except psutil.NoSuchProcess:
            return 0

    def cpu_seconds(self) -> float:
        times = self._usage.cpu_times()
        return float(times.user + times.system)

    def metric(self, name: str) -> float:
        """The sum over a metric's labels; 0 while the operator does not answer."""
        address = f"http://{LOOPBACK}:{self._port}/metrics"
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return 0.0
        told = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return sum(float(value) for key, value in told if key.partition("{")[0] == name)

    def passes(self) -> float:
        return self.metric("tempflow_reconcile_seconds_count")

    def requests(self) -> float:
        return self.metric("tempflow_api_requests_total")

    def wait_leading(self) -> float:
        """Seconds from its start until it leads."""
        wait_for(
            "an operator that leads",
            lambda: self.metric("tempflow_leader") == 1,
            deadline_seconds=60 + _LEASE_SECONDS,
            poll_seconds=0.1,
        )
        return time.monotonic() - self.started

    def wait_consistent(self, jobs: int) -> float:
        """Seconds from its start until each of the jobs had a pass and none waits for one."""

        def consistent() -> bool:
            return self.passes() >= jobs and self.metric("tempflow_queue_depth") == 0

        wait_for("a pass of every job", consistent, deadline_seconds=600, poll_seconds=0.2)
        return time.monotonic() - self.started

    def runs(self) -> bool:
        """True; ClusterError when it has ended by itself."""
        if self._process.poll() is not None:
            raise ClusterError(f"the operator has ended: see {self._log}")
        return True

    def stop(self) -> None:
        """As a rollout does."""
        self._over.set()
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
