"""What ended trainers left behind, kept from the moment at which the watch told of it.

When a job is suspended its pods are gone soon after they have ended, often before the next list.
The watch tells of every change, so of the ended container too. After a restart of the operator it
is lost, and then status names the run instead of a checkpoint.
"""

from tempflow_api.termination import LastWords

_MOST_JOBS = 10_000


class Heard:
    """The newest words of each job."""

    def __init__(self) -> None:
        self._words: dict[tuple[str, str], LastWords] = {}

    def note(self, namespace: str, job_uid: str, words: LastWords) -> None:
        """Of a pod in that namespace that says it belongs to that job."""
        key = (namespace, job_uid)
        known = self._words.pop(key, None)
        if known is not None and known.start > words.start:
            words = known
        self._words[key] = words
        if len(self._words) > _MOST_JOBS:  # of jobs long gone; the oldest come first
            del self._words[next(iter(self._words))]

    def of(self, namespace: str, job_uid: str) -> LastWords | None:
        return self._words.get((namespace, job_uid))
