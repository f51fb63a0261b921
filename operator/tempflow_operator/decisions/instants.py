"""Kubernetes' timestamps as seconds since 1970, and back."""

from datetime import UTC, datetime


def seconds(timestamp: str) -> float:
    """``2026-01-31T12:00:00Z`` as seconds; a timestamp with a fraction keeps it."""
    return datetime.fromisoformat(timestamp).timestamp()


def timestamp(seconds: float) -> str:
    """Whole seconds, rounded down, as the API server writes them."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_timestamp(seconds: float) -> str:
    """Microseconds, as Leases and events have them."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
