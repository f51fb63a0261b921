"""What the store knows of a run beside its checkpoints: the job, and the record."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ConfigChanged
from tempflow_api.rules import Mutability, changed_fields, mutability_of
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer.metrics import Record
from tempflow_trainer.store import Store

log = logging.getLogger(__name__)


@dataclass
class StoredRun:
    """A run's folder in the store, and its record on this machine; rank 0 uses it."""

    store: Store
    record: Record
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Files of the record that the store has, by size and time of change."""

    def check_same(self, spec: JobSpec) -> None:
        """Compare with the job that this run started as, and store it if it is the first.

        Raises:
            ConfigChanged: a field that decides what is learned is another one.
        """
        own = spec.model_dump_json(by_alias=True, indent=1).encode()
        if self.store.create(layout.RUN_FILE, own):
            return
        before = JobSpec.model_validate_json(self.store.read(layout.RUN_FILE))
        changed = changed_fields(before, spec)
        fixed = [p for p in changed if mutability_of(p) is Mutability.IMMUTABLE]
        if fixed:
            raise ConfigChanged(
                f"the run at {self.store.uri} was started with other values of {', '.join(fixed)}; "
                "these decide what is learned: restore them, or give the job another name"
            )
        if changed:
            log.info("continues with new values of %s", ", ".join(changed))

    def send(self) -> None:
        """Copy the record beside the checkpoints where they are kept elsewhere."""
        root = self.record.folder / layout.RECORD
        if self._in_place():
            return
        for file in sorted(root.rglob("*")):
            if not file.is_file() or file.name.endswith(".partial"):
                continue
            key = f"{layout.RECORD}/{file.relative_to(root).as_posix()}"
            status = file.stat()
            if self._sent.get(key) != (status.st_size, status.st_mtime_ns):
                self.store.put(file, key)
                self._sent[key] = (status.st_size, status.st_mtime_ns)

    def fetch(self) -> None:
        """On a new machine the record so far is in the store only."""
        if self._in_place() or (self.record.folder / layout.METRICS).is_file():
            return
        for key in self.store.find(layout.RECORD):
            self.store.get(key, self.record.folder / key)

    def _in_place(self) -> bool:
        return Path(self.store.uri) == self.record.folder.absolute()
