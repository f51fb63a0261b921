"""The record of a run beside its checkpoints, where these are elsewhere: it outlives the pods."""

from collections.abc import Callable
from pathlib import Path

from tempflow_api import checkpoint_layout as layout
from tempflow_trainer.store_base import Store


class RecordCopy:
    """Sends what changed, and fetches all on a new machine.

    All but the logs: each rank cares for its own, see ``log_tail``.
    """

    def __init__(self, folder: Path, store: Store, check_owner: Callable[[], None]) -> None:
        """
        Args:
            folder: the run's own, which holds the record.
            check_owner: raises Fenced when the run is a newer start's. It is asked before each
                file, so a start that was paused and taken over leaves the newer one's alone.
        """
        self._folder, self._store, self._check_owner = folder, store, check_owner
        self._sent: dict[str, tuple[int, int]] = {}
        """Size and time of change of what the store has."""

    def send(self) -> None:
        """Store the files that changed since they were sent.

        Raises:
            StoreUnavailable: the store refuses.
            Fenced: a newer start has taken the run over.
        """
        if self._in_place():
            return
        root = self._folder / layout.RECORD
        for file in sorted(root.rglob("*")):
            key = f"{layout.RECORD}/{file.relative_to(root).as_posix()}"
            if not file.is_file() or file.name.endswith(".partial") or _is_log(key):
                continue
            status = file.stat()
            if self._sent.get(key) != (status.st_size, status.st_mtime_ns):
                self._check_owner()
                self._store.put(file, key)
                self._sent[key] = (status.st_size, status.st_mtime_ns)

    def fetch(self) -> None:
        """On a new machine the record so far is in the store only.

        Raises:
            StoreUnavailable: the store refuses.
        """
        if self._in_place() or (self._folder / layout.METRICS).is_file():
            return
        for key in self._store.find(layout.RECORD):
            if not _is_log(key):
                file = self._folder / key
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(self._store.read(key))

    def _in_place(self) -> bool:
        return Path(self._store.uri) == self._folder.absolute()


def _is_log(key: str) -> bool:
    return key.startswith(f"{layout.LOGS}/")
