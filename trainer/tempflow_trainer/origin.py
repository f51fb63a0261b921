"""What a new run starts from: another run's checkpoint, or nothing while others lie beside it."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import CheckpointCorrupt, ConfigChanged, ModelUnavailable, StoreUnavailable
from tempflow_api.retention import Retention
from tempflow_api.rules import Mutability, changed_fields, mutability_of
from tempflow_api.storage import Checkpoint, InitFrom
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.ledger import look
from tempflow_trainer.store import open_at
from tempflow_trainer.store_base import Store

log = logging.getLogger(__name__)

_PLACE = "spec.checkpoint.uri"


@dataclass(frozen=True)
class Origin:
    """The run that ``spec.initFrom`` names. It is only read."""

    checkpoints: Checkpoints
    folder: str | None
    """The one checkpoint that the address names, else the newest sound one is taken."""
    mode: Literal["resume", "weights"]

    @classmethod
    def of(cls, init: InitFrom, settings: Checkpoint, staging: Path) -> "Origin":
        """The run, or the checkpoint, at an address in the store of ``spec.checkpoint``."""
        run, _, last = init.uri.rstrip("/").rpartition("/")
        named = layout.parse_folder(last)
        uri = run if named else init.uri.rstrip("/")
        store = open_at(uri.removesuffix(f"/{layout.CHECKPOINTS}"), settings)
        reader = Checkpoints(store, staging, attempt=0, world_size=1, retention=Retention(2))
        return cls(reader, f"{layout.CHECKPOINTS}/{last}" if named else None, init.mode)

    @property
    def uri(self) -> str:
        return self.checkpoints.store.uri

    def choose(self) -> str:
        """The folder to start from.

        Raises:
            ModelUnavailable: there is no checkpoint.
            CheckpointCorrupt: there is, and it is damaged.
        """
        committed = {f"{layout.CHECKPOINTS}/{f.name}" for f in self.checkpoints.committed()}
        if self.folder is not None and self.folder in committed:
            self.checkpoints.examine(self.folder)
            return self.folder
        found = None if self.folder else self.checkpoints.newest_sound()
        if found is None:
            wanted = self.folder or layout.CHECKPOINTS
            raise ModelUnavailable(
                f"spec.initFrom.uri: no complete checkpoint at {self.uri}/{wanted}; expected the "
                "folder of a run or of one of its checkpoints, see 'tempflow checkpoints list'"
            )
        return found

    def load(self, folder: str) -> State:
        """What the new run starts with."""
        state = self.checkpoints.load(folder)
        if self.mode == "resume":
            return state
        return State(
            epochs_done=0,
            updates_done=0,
            trained=state.average,
            average=state.average,
            optimizer={},
            totals={},
        )


def older_runs(store: Store, run_folder: str) -> list[str]:
    """Runs of the same name, with checkpoints, beside a run's folder ``name-uid``.

    Only a hint hangs on it, so a store that does not show them (the credentials may be for the
    run's own folder), or a damaged one among them, is a warning.

    Args:
        store: of the folder in which the runs lie.
        run_folder: the name of the run's own folder.
    """
    name, dash, own = run_folder.rpartition("-")
    if not dash or not re.fullmatch(r"[0-9a-f]{8}", own):
        return []  # a local run: the same name continues it
    alike = re.compile(rf"{re.escape(name)}-[0-9a-f]{{8}}")
    try:
        return [
            f"{store.uri}/{folder}"
            for folder in store.folders("")
            if folder != run_folder
            and alike.fullmatch(folder)
            and look(store.below(folder)).committed
        ]
    except (StoreUnavailable, CheckpointCorrupt) as error:
        log.warning("cannot see whether an older run of this name has checkpoints: %s", error)
        return []


def check_same_run(checkpoints: Checkpoints, spec: JobSpec) -> None:
    """Compare with the job that this run started as, and store it if it is the first.

    A run that was copied to another place is the same run.

    Raises:
        ConfigChanged: a field that decides what is learned has another value.
    """
    store = checkpoints.store
    own = spec.model_dump_json(by_alias=True, indent=1).encode()
    if store.create(layout.RUN_FILE, own):
        return
    changed = changed_fields(JobSpec.model_validate_json(store.read(layout.RUN_FILE)), spec)
    fixed = [p for p in changed if mutability_of(p) is Mutability.IMMUTABLE and p != _PLACE]
    if fixed:
        raise ConfigChanged(
            f"the run at {store.uri} was started with other values of {', '.join(fixed)}; "
            "these decide what is learned: restore them, or give the job another name"
        )
    if changed:
        log.info("continues with new values of %s", ", ".join(changed))
