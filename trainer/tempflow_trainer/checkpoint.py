"""Save and restore a run: whole steps or nothing.

Files are staged on local disk, copied into a folder of their own, and then a manifest that lists
them with their digests is created, and then the entry of the ledger that makes it count. A folder
without manifest does not exist; a file that differs from its manifest makes the reader fall back to
the checkpoint before, never to zero in silence.
"""

import errno
import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.checkpoint_layout import CheckpointManifest, Folder, StoredFile
from tempflow_api.errors import CheckpointCorrupt, Fenced, StoreUnavailable
from tempflow_api.retention import Retention
from tempflow_trainer import ledger, sharding
from tempflow_trainer.ledger import Ledger
from tempflow_trainer.store_base import Store

log = logging.getLogger(__name__)

TRAINED, AVERAGE, OPTIMIZER, COUNTERS = (
    "trained.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "counters.json",
)
MOST_FALLBACKS = 3
FORGET_SECONDS = 30.0
SPACE = 1.2
"""Free space asked for before staging, as a multiple of what is to be written."""


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


def snapshot(
    trained: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    keep: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Copies in memory of weights, average and optimizer, which training does not change any more:
    all that it waits for. All ranks have to ask; one that does not keep them gets nothing."""
    return (
        _host_copy(sharding.gathered(trained, keep=keep)),
        _host_copy(sharding.gathered(average, keep=keep)),
        optimizer_tensors(optimizer, list(trained), keep=keep),
    )


def _host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


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
                found[f"{key}/{names[index]}"] = tensor.to("cpu", copy=True)
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


@dataclass
class Staged:
    """Files of a checkpoint on local disk, ready to be sent."""

    local: Path
    step: int
    files: list[StoredFile]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass
class Checkpoints:
    """The checkpoints of one run in one store, written by one start of it."""

    store: Store
    staging: Path
    attempt: int
    world_size: int
    retention: Retention
    save_seconds: float = 1800.0
    """A save is given up after so long."""
    ledger: Ledger | None = None
    """Since ``begin``, on the rank that writes."""
    parent: str | None = None
    """What the next checkpoint continues from."""
    _evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    _sound: tuple[str, State] | None = None
    """The folder that was found last, and what is in it, until somebody takes it."""

    def begin(self) -> str | None:
        """Take the run over; the folder to continue from, None in a run without checkpoints.

        Raises:
            Fenced: a later attempt has the run.
            CheckpointCorrupt: there are checkpoints, and the newest few are all damaged.
            StoreUnavailable: the store does not answer; that says nothing about a checkpoint.
        """
        self.ledger = Ledger.claim(self.store, self.attempt, self._soundest)
        self.parent = self.ledger.newest.resumed_from
        return f"{layout.CHECKPOINTS}/{self.parent}" if self.parent else None

    def check(self) -> None:
        """Ask whether the run is still this start's.

        Raises:
            Fenced: it is not.
        """
        self._claimed().check()

    def save(
        self,
        state: State,
        export: Callable[[Path], None],
        evaluation: Mapping[str, float] | None = None,
    ) -> str:
        """Write the state and the exported result; returns the checkpoint's folder.

        Raises:
            StoreUnavailable: a full or unwritable disk, or a store that refuses. Nothing that
                was complete before is touched, what is half-written is removed or has no
                manifest.
            Fenced: a newer start has taken the run over.
        """
        with self.staged(state, export) as staged:
            return self.send(staged, evaluation or {})

    @contextmanager
    def staged(self, state: State, export: Callable[[Path], None]) -> Iterator[Staged]:
        """A context in which the files of a checkpoint, with their digests, are on local disk.

        Raises:
            StoreUnavailable: a full or unwritable disk.
        """
        local = self.staging / f"save-{uuid.uuid4().hex}"
        try:
            try:
                _check_space(self.staging, state)
                _stage(local, state, export)
                files = [_describe(local, f) for f in sorted(local.rglob("*")) if f.is_file()]
            except (OSError, SafetensorError) as error:
                raise StoreUnavailable(f"cannot stage a checkpoint in {local}: {error}") from error
            yield Staged(local, state.epochs_done, files)
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def send(self, staged: Staged, evaluation: Mapping[str, float]) -> str:
        """Copy staged files into a folder of their own, and make it count; returns the folder.

        Raises:
            StoreUnavailable: as ``save`` says.
            Fenced: as ``save`` says.
        """
        store, ledger = self.store.within(self.save_seconds), self._claimed()
        ledger.check(store)
        folder = self._fresh_folder(store, staged.step)
        sent: list[str] = []
        try:
            for file in staged.files:
                sent.append(f"{folder}/{file.path}")
                store.put(staged.local / file.path, sent[-1])
        except StoreUnavailable:
            self._forget(sent)
            raise
        name = folder.rpartition("/")[2]
        self._complete(store, folder, staged, evaluation)
        self._evaluations[name] = dict(evaluation)
        self._make_count(store, name)
        self.parent = name
        return folder

    def _complete(
        self, store: Store, folder: str, staged: Staged, evaluation: Mapping[str, float]
    ) -> None:
        manifest = CheckpointManifest(
            step=staged.step,
            attempt=self.attempt,
            incarnation=self._claimed().newest.incarnation,
            parent=self.parent,
            nonce=uuid.uuid4().hex,
            world_size=self.world_size,
            versions=versions(),
            time=_now(),
            evaluation=dict(evaluation),
            files=staged.files,
        )
        content = manifest.model_dump_json(by_alias=True, indent=1).encode()
        # A reply that is lost makes the repeated request find its own manifest.
        if (
            not store.create(f"{folder}/{layout.MANIFEST}", content)
            and self._read_manifest(folder).nonce != manifest.nonce
        ):
            raise Fenced(f"{store.uri}/{folder} was completed by another process")

    def _make_count(self, store: Store, name: str) -> None:
        """The entry of the ledger; then what follows from it, which may fail without harm."""
        pinned = frozenset(
            key.rpartition("/")[2].removesuffix(".json") for key in store.find(layout.PINS)
        )

        def retained(names: list[str]) -> list[str]:
            folders = [folder for n in names if (folder := layout.parse_folder(n)) is not None]
            kept = self.retention.kept(folders, self._evaluations_of(names), pinned)
            return [folder.name for folder in kept]

        retired = self._claimed().commit(name, retained, store)
        try:
            self._hint(store, name)
            for old in retired:
                folder = f"{layout.CHECKPOINTS}/{old}"
                keys = sorted(store.find(folder), key=lambda k: not k.endswith(layout.MANIFEST))
                store.delete(keys)
        except StoreUnavailable as error:
            log.warning("the checkpoint is complete, but cleaning up after it failed: %s", error)

    def _evaluations_of(self, names: list[str]) -> dict[str, dict[str, float]]:
        """Metrics by folder; asked for in the store once a folder, and only if they decide."""
        for name in names if self.retention.best_count else []:
            if name not in self._evaluations:
                try:
                    found = self._read_manifest(f"{layout.CHECKPOINTS}/{name}").evaluation
                except CheckpointCorrupt:
                    found = {}
                self._evaluations[name] = found
        return self._evaluations

    def _hint(self, store: Store, name: str) -> None:
        folder = layout.parse_folder(name)
        latest = layout.Latest(folder=name, step=folder.step if folder else 0, time=_now())
        file = self.staging / f"latest-{uuid.uuid4().hex}.json"
        try:
            file.write_text(latest.model_dump_json(by_alias=True, indent=1))
            store.put(file, layout.LATEST)
        except OSError as error:
            raise StoreUnavailable(f"cannot write {file}: {error.strerror}") from error
        finally:
            file.unlink(missing_ok=True)

    def _claimed(self) -> Ledger:
        if self.ledger is None:
            raise ValueError("begin() comes before the first save")
        return self.ledger

    def _fresh_folder(self, store: Store, step: int) -> str:
        incarnation = self._claimed().newest.incarnation
        taken = {key.split("/")[1] for key in store.find(layout.CHECKPOINTS)}
        save = 1
        while layout.folder_name(step, self.attempt, incarnation, save) in taken:
            save += 1
        return f"{layout.CHECKPOINTS}/{layout.folder_name(step, self.attempt, incarnation, save)}"

    def _forget(self, keys: list[str]) -> None:
        # With time of its own: the save's may be used up.
        try:
            self.store.within(FORGET_SECONDS).delete(keys)
        except StoreUnavailable as error:
            log.warning("left an incomplete checkpoint behind: %s", error)

    def committed(self) -> list[Folder]:
        """The checkpoints that count, newest first."""
        return ledger.look(self.store).committed

    def newest_sound(self) -> str | None:
        """The folder of the newest checkpoint that passes validation; None in a run without any.

        Raises:
            CheckpointCorrupt: there are checkpoints, and the newest few are all damaged.
            StoreUnavailable: the store does not answer; that says nothing about a checkpoint.
        """
        found = self._soundest(self.committed())
        return f"{layout.CHECKPOINTS}/{found.name}" if found else None

    def _soundest(self, newest_first: Sequence[Folder]) -> Folder | None:
        failures = []
        for folder in newest_first[:MOST_FALLBACKS]:
            try:
                self.examine(f"{layout.CHECKPOINTS}/{folder.name}")
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

    def examine(self, folder: str) -> None:
        """Read a checkpoint whole; ``load`` does not read it again.

        Raises:
            CheckpointCorrupt: a file that is missing, cut or changed.
        """
        manifest = self._read_manifest(folder)
        self._sound = folder, self._read_whole(folder, manifest)
        if (there := manifest.versions) != (here := versions()):
            log.info("%s was written with %s, and here is %s", folder, there, here)

    def load(self, folder: str) -> State:
        """The state in a checkpoint, every file checked against the manifest.

        What was read to find the newest sound one is not read again.

        Raises:
            CheckpointCorrupt: a file that is missing, cut or changed.
        """
        sound, self._sound = self._sound, None
        if sound and sound[0] == folder:
            return sound[1]
        return self._read_whole(folder, self._read_manifest(folder))

    def _read_whole(self, folder: str, manifest: CheckpointManifest) -> State:
        local = self.staging / f"load-{uuid.uuid4().hex}"
        there = self.store.find(folder)
        files = [file for file in manifest.files if file.path.startswith(f"{layout.STATE}/")]
        try:
            for file in files:
                self._check_size(f"{folder}/{file.path}", file, there)
            for file in files:
                self._fetch(folder, file, local)
            return _read_state(local / layout.STATE)
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _check_size(self, key: str, file: StoredFile, there: Mapping[str, int]) -> None:
        if key not in there:
            raise CheckpointCorrupt(f"{key} is missing")
        if there[key] != file.size:
            raise CheckpointCorrupt(
                f"{key} has {there[key]} bytes, but its manifest says {file.size}"
            )

    def _fetch(self, folder: str, file: StoredFile, local: Path) -> None:
        key = f"{folder}/{file.path}"
        try:
            digest = self.store.get(key, local / file.path, file.size)
        except StoreUnavailable:
            self._check_there(key)
            raise
        if digest != file.sha256:
            raise CheckpointCorrupt(f"{key} differs from its manifest")

    def _check_there(self, key: str) -> None:
        """An older start may be deleting what it lets go of: that is no store that fails."""
        if key not in self.store.find(key):
            raise CheckpointCorrupt(f"{key} is missing")

    def _read_manifest(self, folder: str) -> CheckpointManifest:
        key = f"{folder}/{layout.MANIFEST}"
        try:
            manifest = CheckpointManifest.model_validate_json(self.store.read(key))
        except StoreUnavailable:
            self._check_there(key)
            raise
        except (ValidationError, UnicodeDecodeError) as error:
            raise CheckpointCorrupt(f"{folder}: its manifest is damaged") from error
        named = layout.parse_folder(folder.rpartition("/")[2])
        said = (manifest.step, manifest.attempt, manifest.incarnation)
        if named is not None and said != (named.step, *named.writer):
            raise CheckpointCorrupt(f"{folder}: its manifest is of another checkpoint")
        return manifest


@cache
def versions() -> dict[str, str]:
    """What is installed here of what decides the numbers of a run."""
    return {name: metadata.version(name) for name in ("tempflow", "torch", "diffusers", "peft")}


def _check_space(folder: Path, state: State) -> None:
    """OSError before a disk is filled that other processes need, too."""
    parts = (state.trained, state.average, state.optimizer)
    # The result is written beside the state, and is about as large as the average.
    sizes = [t.numel() * t.element_size() for part in (*parts, parts[1]) for t in part.values()]
    free = shutil.disk_usage(folder).free
    if free < SPACE * sum(sizes):
        raise OSError(
            errno.ENOSPC,
            f"{free} bytes are free, {int(SPACE * sum(sizes))} are needed",
            str(folder),
        )


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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
