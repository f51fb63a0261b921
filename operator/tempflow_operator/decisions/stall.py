"""Whether an attempt still gets anywhere, by what its rank 0 says."""

from tempflow_operator.decisions import instants
from tempflow_operator.decisions.observed import TrainingJob
from tempflow_operator.decisions.reading import Reading


def moved_at(job: TrainingJob, reading: Reading | None, now: float) -> float | None:
    """When progress last moved, by this clock; None while there is none."""
    known = job.status.progress
    if reading is not None and reading.progress is not None and reading.progress != known:
        return now
    moved = job.status.progress_moved_at
    return None if moved is None else instants.seconds(moved)


def stalls_at(job: TrainingJob, attempt: int, reading: Reading | None, now: float) -> float | None:
    """When the attempt counts as stalled if nothing more is heard; None when that cannot be said.

    Only an answer that is understood counts as standing still: where rank 0 cannot be read, it is
    the network or the operator that may be at fault, and a healthy run must not die of it. A
    checkpoint takes as long as the store takes.
    """
    limit = job.spec.run_policy.stall_timeout_seconds if job.spec is not None else None
    progress = reading.progress if reading is not None else None
    if limit is None or reading is None or reading.problem or progress is None:
        return None
    if progress.attempt != attempt or progress.phase in ("checkpoint", "done"):
        return None
    moved = moved_at(job, reading, now)
    return None if moved is None else moved + limit
