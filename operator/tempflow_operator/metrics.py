"""Prometheus metrics of the operator. None names a job: their number does not grow with jobs."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_PASS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_START_BUCKETS = (5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """All of them, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.passes = Histogram(
            "tempflow_reconcile_seconds",
            "Duration of a reconcile pass.",
            buckets=_PASS_BUCKETS,
            registry=self.registry,
        )
        self.errors = self._counter(
            "tempflow_reconcile_errors", "Reconcile passes that failed.", "error"
        )
        self.requests = self._counter(
            "tempflow_api_requests", "Requests to the API server.", "verb", "resource", "code"
        )
        self.restarts = self._counter(
            "tempflow_restarts", "Attempts that ended without success, by class.", "outcome"
        )
        self.progress_reads = self._counter(
            "tempflow_progress_reads", "Reads of a job's progress.", "result"
        )
        self.events = self._counter("tempflow_watch_events", "Events received.", "kind")
        self.time_to_running = Histogram(
            "tempflow_time_to_running_seconds",
            "From an attempt's start until all its pods run.",
            buckets=_START_BUCKETS,
            registry=self.registry,
        )
        self.jobs = Gauge(
            "tempflow_jobs",
            "Jobs by phase, as of the last list.",
            ["phase"],
            registry=self.registry,
        )
        self.leader = Gauge("tempflow_leader", "1 where this replica acts.", registry=self.registry)
        self.queue_depth = Gauge(
            "tempflow_queue_depth", "Jobs due for a pass or in one.", registry=self.registry
        )
        self.queue_wait = Gauge(
            "tempflow_queue_longest_wait_seconds",
            "How long the job that waits longest has been due or in a pass.",
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def watch_queue(self, depth: Callable[[], float], longest_wait: Callable[[], float]) -> None:
        """Read the queue's state whenever the metrics are read."""
        self.queue_depth.set_function(depth)
        self.queue_wait.set_function(longest_wait)

    def set_jobs(self, by_phase: Mapping[str, int]) -> None:
        """Replace the counts of jobs."""
        self.jobs.clear()
        for phase, count in by_phase.items():
            self.jobs.labels(phase).set(count)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
