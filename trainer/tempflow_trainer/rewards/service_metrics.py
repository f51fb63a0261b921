"""What a reward service measures of itself, for Prometheus."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tempflow_trainer.rewards.wire import ItemScore

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ServiceMetrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self, reward: str) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "tempflow_reward_requests",
            "Requests for scores, by HTTP status.",
            ["reward", "code"],
            registry=self.registry,
        )
        self._images = Counter(
            "tempflow_reward_images",
            "Pictures answered, by outcome: scored, or failed with a reason.",
            ["reward", "outcome"],
            registry=self.registry,
        )
        self._held = Gauge(
            "tempflow_reward_queued_images",
            "Pictures that wait or are being scored; replicas can scale by it.",
            ["reward"],
            registry=self.registry,
        )
        self._batch = Histogram(
            "tempflow_reward_batch_images",
            "Pictures in a batch.",
            ["reward"],
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self._seconds = Histogram(
            "tempflow_reward_batch_seconds",
            "Seconds that the scorer took for a batch.",
            ["reward"],
            registry=self.registry,
        )
        self._reward = reward

    def watch_queue(self, held: Callable[[], int]) -> None:
        """Read the gauge from ``held`` whenever it is asked for."""
        self._held.labels(self._reward).set_function(held)

    def request_done(self, status: int) -> None:
        self._requests.labels(self._reward, str(status)).inc()

    def batch_done(self, images: int, seconds: float) -> None:
        self._batch.labels(self._reward).observe(images)
        self._seconds.labels(self._reward).observe(seconds)

    def images_done(self, scores: Iterable[ItemScore]) -> None:
        for score in scores:
            outcome = "scored" if score.error is None else "failed"
            self._images.labels(self._reward, outcome).inc()
