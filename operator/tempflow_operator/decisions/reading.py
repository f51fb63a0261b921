"""What was last read of a job's progress."""

from dataclasses import dataclass

from tempflow_api.status import Progress


@dataclass(frozen=True)
class Reading:
    """The newest progress of rank 0, or why there is none to be had."""

    progress: Progress | None = None
    problem: str = ""
