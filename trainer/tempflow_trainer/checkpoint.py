"""Save and restore a run: whole steps or nothing.

Files are staged on local disk, copied into a folder of their own, and then a manifest that lists
them with their digests is created. A folder without manifest does not exist; a file that differs
from its manifest makes the reader fall back to the checkpoint before, never to zero in silence.
"""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.checkpoint_layout import CheckpointManifest, StoredFile
from tempflow_api.errors import CheckpointCorrupt, StoreUnavailable
from tempflow_trainer import sharding
from tempflow_trainer.store import Store

log = logging.getLogger(__name__)

TRAINED, AVERAGE, OPTIMIZER, COUNTERS = (
    "trained.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "counters.json",
)
MOST_FALLBACKS = 3


@dataclass(frozen=True)
class State:
    """Everything that a run continues from. Randomness needs no state: see ``seeds``."""

    epochs_done: int
    updates_done: int
    trained: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    totals: dict[str, float]
    """Counters of the whole run so far, for its summary."""


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], *, keep: bool = True
) -> dict[str, Tensor]:
    """The optimizer's state as flat named tensors, ``<state>/<parameter>``; no pickle.

    All ranks have to ask where the state is sharded; one that does not keep it gets nothing.
    """
    state = optimizer.state_dict()["state"]
    found = {}
    for index, values in state.items():
        for key, value in values.items():
            tensor = sharding.whole(torch.as_tensor(value))
            if keep:
                found[f"{key}/{names[index]}"] = tensor.cpu().clone()
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]
) -> None:
    """Put the tensors of ``optimizer_tensors`` back; rates and groups stay as configured."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        key, _, name = path.partition("/")
        parameter = parameters[index[name]]
        is_of_every_weight = tensor.shape == parameter.shape
        state.setdefault(index[name], {})[key] = (
            sharding.like(tensor, parameter) if is_of_every_weight else tensor
        )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in one store, written by one attempt."""

    store: Store
    staging: Path
    attempt: int
    world_size: int
    keep_last: int

    def save(self, state: State, export: Callable[[Path], None]) -> str:
        """Write the state and the exported result; returns the checkpoint's folder.

        Raises:
            StoreUnavailable: a full or unwritable disk, or a store that refuses. Nothing that
                was complete before is touched, what is half-written is removed or has no
                manifest.
        """
        local = self.staging / f"save-{uuid.uuid4().hex}"
        try:
            _stage(local, state, export)
            return self._commit(local, state.epochs_done)
        except (OSError, SafetensorError) as error:
            raise StoreUnavailable(f"cannot stage a checkpoint in {local}: {error}") from error
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _commit(self, local: Path, step: int) -> str:
        folder = self._fresh_folder(step)
        files = [_describe(local, file) for file in sorted(local.rglob("*")) if file.is_file()]
        sent: list[str] = []
        try:
            for file in files:
                sent.append(f"{folder}/{file.path}")
                self.store.put(local / file.path, sent[-1])
        except StoreUnavailable:
            self._forget(sent)
            raise
        manifest = CheckpointManifest(
            step=step,
            attempt=self.attempt,
            nonce=uuid.uuid4().hex,
            world_size=self.world_size,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            files=files,
        )
        content = manifest.model_dump_json(by_alias=True, indent=1).encode()
        if not self.store.create(f"{folder}/{layout.MANIFEST}", content):
            self._check_own(folder, manifest.nonce)
        self._retire(step)
        return folder

    def _check_own(self, folder: str, nonce: str) -> None:
        # A reply that is lost makes the repeated request find its own manifest.
        if self._read_manifest(folder).nonce != nonce:
            raise StoreUnavailable(f"{self.store.uri}/{folder} was completed by another process")

    def _fresh_folder(self, step: int) -> str:
        taken = {key.split("/")[1] for key in self.store.find(layout.CHECKPOINTS)}
        save = 1
        while layout.folder_name(step, self.attempt, save) in taken:
            save += 1
        return f"{layout.CHECKPOINTS}/{layout.folder_name(step, self.attempt, save)}"

    def _forget(self, keys: list[str]) -> None:
        try:
            self.store.delete(keys)
        except StoreUnavailable as error:
            log.warning("left an incomplete checkpoint behind: %s", error)

    def _retire(self, newest: int) -> None:
        """Delete complete checkpoints beyond the last ``keep_last``, manifest first."""
        complete = self.complete()
        for folder in [f for f, step in complete if step <= newest][self.keep_last :]:
            keys = sorted(self.store.find(folder), key=lambda k: not k.endswith(layout.MANIFEST))
            try:
                self.store.delete(keys)
            except StoreUnavailable as error:
                log.warning("an old checkpoint stays: %s", error)

    def complete(self) -> list[tuple[str, int]]:
        """(folder, step) of every folder with a manifest, newest first."""
        found = []
        for key in self.store.find(layout.CHECKPOINTS):
            folder, _, file = key.rpartition("/")
            parsed = layout.parse_folder(folder.rpartition("/")[2])
            if file == layout.MANIFEST and parsed is not None:
                found.append((parsed, folder))
        return [(folder, parsed[0]) for parsed, folder in sorted(found, reverse=True)]

    def newest_sound(self) -> str | None:
        """The newest checkpoint that passes validation; None in a run that has none.

        Raises:
            CheckpointCorrupt: there are checkpoints, and the newest few are all damaged.
            StoreUnavailable: the store does not answer; that says nothing about a checkpoint.
        """
        failures = []
        for folder, _ in self.complete()[:MOST_FALLBACKS]:
            try:
                self.load(folder)
                return folder
            except CheckpointCorrupt as error:
                log.warning("checkpoint skipped: %s", error)
                failures.append(str(error))
        if failures:
            raise CheckpointCorrupt(
                f"none of the newest {len(failures)} checkpoints of {self.store.uri} can be used: "
                + "; ".join(failures)
                + "; move the run's folder aside to start anew"
            )
        return None

    def load(self, folder: str) -> State:
        """The state in a checkpoint, every file checked against the manifest.

        Raises:
            CheckpointCorrupt: a file that is missing, cut or changed.
        """
        local = self.staging / f"load-{uuid.uuid4().hex}"
        there = self.store.find(folder)
        try:
            for file in self._read_manifest(folder).files:
                if not file.path.startswith(f"{layout.STATE}/"):
                    continue
                if f"{folder}/{file.path}" not in there:
                    raise CheckpointCorrupt(f"{folder}/{file.path} is missing")
                self.store.get(f"{folder}/{file.path}", local / file.path)
                if _describe(local, local / file.path) != file:
                    raise CheckpointCorrupt(f"{folder}/{file.path} differs from its manifest")
            return _read_state(local / layout.STATE)
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _read_manifest(self, folder: str) -> CheckpointManifest:
        local = self.staging / f"manifest-{uuid.uuid4().hex}.json"
        try:
            self.store.get(f"{folder}/{layout.MANIFEST}", local)
            return CheckpointManifest.model_validate_json(local.read_bytes())
        except (ValidationError, UnicodeDecodeError) as error:
            raise CheckpointCorrupt(f"{folder}: its manifest is damaged") from error
        finally:
            local.unlink(missing_ok=True)


def _stage(local: Path, state: State, export: Callable[[Path], None]) -> None:
    folder = local / layout.STATE
    folder.mkdir(parents=True)
    save_file(_plain(state.trained), folder / TRAINED)
    save_file(_plain(state.average), folder / AVERAGE)
    save_file(_plain(state.optimizer), folder / OPTIMIZER)
    counters = {
        "epochsDone": state.epochs_done,
        "updatesDone": state.updates_done,
        "totals": state.totals,
    }
    (folder / COUNTERS).write_text(json.dumps(counters))
    export(local)


def _read_state(folder: Path) -> State:
    counters = json.loads((folder / COUNTERS).read_text())
    return State(
        epochs_done=counters["epochsDone"],
        updates_done=counters["updatesDone"],
        trained=load_file(folder / TRAINED),
        average=load_file(folder / AVERAGE),
        optimizer=load_file(folder / OPTIMIZER),
        totals=counters["totals"],
    )


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _describe(root: Path, file: Path) -> StoredFile:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return StoredFile(
        path=file.relative_to(root).as_posix(),
        size=file.stat().st_size,
        sha256=digest.hexdigest(),
    )
