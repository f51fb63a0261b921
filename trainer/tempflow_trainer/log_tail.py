"""The last lines of a rank's log, kept beside the checkpoints: they outlive the pod.

One file an attempt and rank, with a heading where a start of the attempt begins. Nothing is cut
back when a run resumes: what was said was said. A start that was taken over may wake up in the
middle of a request, so its file is not that of the newer attempt.
"""

import logging
import threading
from collections import deque
from pathlib import Path

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import StoreUnavailable
from tempflow_trainer.metrics import now
from tempflow_trainer.store_base import Store

log = logging.getLogger(__name__)

LINES = 200
"""What is kept of a rank and attempt; with ``MOST_CHARACTERS`` at most 400 kB."""
MOST_CHARACTERS = 2000
ATTEMPTS = 5
"""The newest so many are kept."""
END_SECONDS = 10.0
"""For the last request: a rank that was asked to stop has little time left."""


class LogTail(logging.Handler):
    """Keeps what is logged; ``send`` writes it to the run's folder and, where that is elsewhere,
    to the store. Each rank does so for itself, as no machine sees the files of all."""

    def __init__(self, rank: int, attempt: int) -> None:
        super().__init__()
        self._key = layout.log_key(attempt, rank)
        self._kept = {layout.log_key(attempt - n, rank) for n in range(min(ATTEMPTS, attempt + 1))}
        self._rank = rank
        self._lines: deque[str] = deque(maxlen=LINES)
        self._file: Path | None = None
        self._store: Store | None = None
        self._recalled = self._in_place = False
        self._sending = threading.Lock()
        self.note(layout.log_heading(now()))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record; of several lines, where it has them."""
        self.note(self.format(record))

    def note(self, text: str) -> None:
        """Keep text that goes to no logger."""
        self._lines.extend(line[:MOST_CHARACTERS] for line in text.splitlines())

    def connect(self, folder: Path, store: Store) -> None:
        """From now on there is a place to write to. Nothing is asked of the store yet."""
        self._file, self._store = folder / self._key, store
        self._in_place = Path(store.uri) == folder.absolute()

    def send(self, seconds: float = END_SECONDS) -> None:
        """Write the lines, below those of earlier starts of the attempt; a failure is a warning, as
        nothing is decided by them."""
        file, store = self._file, self._store
        if file is None or store is None:
            return
        with self._sending:
            try:
                store = store.within(seconds)
                if not self._recalled:
                    self._recall(store)
                self._write(file, store)
            except (OSError, StoreUnavailable) as error:
                log.warning("the last lines of the log could not be stored: %s", error)

    def _recall(self, store: Store) -> None:
        """Once: put what earlier starts left before the own lines, and forget old attempts."""
        there = store.find(layout.LOGS)
        earlier = store.read(self._key) if self._key in there else b""
        before = earlier.decode(errors="replace").splitlines()
        self.acquire()
        self._lines = deque([*before, *self._lines], maxlen=LINES)
        self.release()
        self._recalled = True
        own = {key for key in there if key.endswith(f"-rank-{self._rank:05d}.log")}
        # Names sort as attempts do; those of newer attempts are not this one's to touch.
        store.delete(sorted(key for key in own - self._kept if key < self._key))

    def _write(self, file: Path, store: Store) -> None:
        self.acquire()
        text = "".join(f"{line}\n" for line in self._lines)
        self.release()
        partial = file.with_name(f"{file.name}.partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
        if not self._in_place:
            store.put(file, self._key)

    def send_beside(self) -> None:
        """The same in a thread of its own: training does not wait for it."""
        threading.Thread(target=self.send, name="log-tail", daemon=True).start()
