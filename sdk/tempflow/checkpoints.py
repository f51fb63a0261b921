"""List and pull the complete checkpoints of a run. The only file here that reads the store.

The store is a local folder or S3. It is only read: no folder and no bucket is ever made there.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem
from pydantic import ValidationError

from tempflow.refused import Refused
from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import CheckpointCorrupt, StoreUnavailable

_S3 = "s3://"
_CHUNK_BYTES = 1 << 22

Advance = Callable[[int, int], None]
"""Told the bytes pulled so far and their total."""


@dataclass(frozen=True)
class Store:
    """A run's folder in a file system."""

    files: AbstractFileSystem
    root: str
    uri: str
    """As the user wrote it, without a slash at its end."""

    def path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))


@dataclass(frozen=True)
class Step:
    """A complete checkpoint."""

    step: int
    """Epochs completed."""
    attempt: int
    incarnation: int
    save: int
    folder: str
    """Its name below ``checkpoints``."""
    manifest: layout.CheckpointManifest | None
    """None if it cannot be understood: the checkpoint is damaged."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.manifest.files) if self.manifest else 0

    @property
    def result(self) -> str:
        """What there is to draw with: adapter, transformer, or nothing."""
        tops = {file.path.split("/")[0] for file in self.manifest.files} if self.manifest else set()
        return next((kind for kind in (layout.ADAPTER, layout.TRANSFORMER) if kind in tops), "")


def open_store(uri: str, endpoint_url: str | None = None, region: str | None = None) -> Store:
    """The run at ``uri``: a folder, ``file://`` or ``s3://bucket/prefix``.

    The run's own ``checkpoints`` folder is accepted, too. Nothing is read yet. Credentials come
    from the environment, a profile or the machine's identity.
    """
    trimmed = uri.rstrip("/").removesuffix(f"/{layout.CHECKPOINTS}")
    if trimmed.startswith(_S3):
        return Store(_s3(endpoint_url, region), trimmed.removeprefix(_S3), trimmed)
    if "://" in trimmed and not trimmed.startswith("file://"):
        raise Refused(f"got {uri}: expects a folder, file:///folder or s3://bucket/prefix")
    from fsspec.implementations.local import LocalFileSystem

    root = str(Path(trimmed.removeprefix("file://")).resolve())
    return Store(LocalFileSystem(use_listings_cache=False), root, trimmed)


def _s3(endpoint_url: str | None, region: str | None) -> AbstractFileSystem:
    # Late: s3fs takes most of a second to load, and a local folder does not need it.
    from s3fs import S3FileSystem

    settings: dict[str, Any] = {
        # A cached listing hides what another machine has written since.
        "use_listings_cache": False,
        "skip_instance_cache": True,
        # s3fs itself retries five times around this.
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 5, "read_timeout": 30},
    }
    if endpoint_url:
        settings["endpoint_url"] = endpoint_url
    if region:
        settings["client_kwargs"] = {"region_name": region}
    return S3FileSystem(**settings)


def steps(store: Store) -> list[Step]:
    """Checkpoints that count, oldest first; an empty list where there is none, or no run.

    Which ones count, the highest entry of the run's ledger says: see ``checkpoint_layout``.
    """
    newest = _newest_entry(store)
    names = _names(store, layout.CHECKPOINTS)
    found = []
    for folder in reversed(layout.committed(names, newest)):
        text = _manifest_text(store, folder.name)
        if text is not None:
            found.append(Step(*folder, folder.name, _manifest(text)))
    return found


def _newest_entry(store: Store) -> layout.Entry | None:
    number = layout.newest_entry(_names(store, layout.LEDGER))
    if number is None:
        return None
    key = layout.entry_key(number)
    with _store_errors(store):
        text = bytes(store.files.cat_file(store.path(key)))
    try:
        return layout.Entry.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointCorrupt(
            f"{store.uri}/{key} is damaged, and it says which checkpoints count; remove it to go "
            "back to the entry before"
        ) from error


def _names(store: Store, folder: str) -> list[str]:
    """Names directly below a folder of the run."""
    with _store_errors(store):
        try:
            found = store.files.ls(store.path(folder), detail=False)
        except FileNotFoundError as error:
            # A prefix without objects is a run that has stored nothing yet; this is not.
            if "bucket does not exist" in str(error):
                raise StoreUnavailable(f"cannot read {store.uri}: {_first_line(error)}") from error
            return []
        return [PurePosixPath(name).name for name in found]


def _manifest_text(store: Store, folder: str) -> bytes | None:
    with _store_errors(store):
        try:
            path = store.path(layout.CHECKPOINTS, folder, layout.MANIFEST)
            return bytes(store.files.cat_file(path))
        except FileNotFoundError:
            return None


def _manifest(text: bytes) -> layout.CheckpointManifest | None:
    try:
        return layout.CheckpointManifest.model_validate_json(text)
    except ValidationError:
        return None


def read(store: Store, path: str) -> bytes | None:
    """The content of a file of the run, for instance ``record/metrics.jsonl``; None without it."""
    with _store_errors(store):
        try:
            return bytes(store.files.cat_file(store.path(path)))
        except FileNotFoundError:
            return None


def find(uri: str, number: int | None, endpoint_url: str | None = None) -> tuple[Store, Step]:
    """A checkpoint of the run at ``uri``, or the very one whose folder ``uri`` is.

    The latter is what the status of a job on a cluster names.
    """
    trimmed = uri.rstrip("/")
    run, _, folder = trimmed.rpartition("/")
    if layout.parse_folder(folder) is None:
        store = open_store(uri, endpoint_url)
        return store, choose(store, number)
    store = open_store(run, endpoint_url)
    named = [step for step in steps(store) if step.folder == folder]
    if not named:
        raise StoreUnavailable(f"no complete checkpoint at {trimmed}; its run may have newer ones")
    if number not in (None, named[0].step):
        raise Refused(f"{trimmed} is the checkpoint of step {named[0].step}: leave out --step")
    return store, named[0]


def choose(store: Store, number: int | None) -> Step:
    """The newest complete checkpoint, or the one after ``number`` epochs."""
    available = steps(store)
    if not available:
        raise StoreUnavailable(
            f"no complete checkpoint at {store.uri}: expects the folder of a run, which holds "
            f"{layout.CHECKPOINTS}/"
        )
    if number is None:
        return available[-1]
    matching = [step for step in available if step.step == number]
    if not matching:
        numbers = ", ".join(str(n) for n in sorted({step.step for step in available}))
        raise Refused(
            f"no complete checkpoint of step {number} at {store.uri}: there are {numbers}"
        )
    return matching[-1]


def pull(
    store: Store, step: Step, target: Path, advance: Advance = lambda _done, _all: None
) -> Path:
    """Copy a checkpoint to the new folder ``target``, which appears only when all of it is there
    and every digest is right."""
    manifest = step.manifest
    if manifest is None:
        raise CheckpointCorrupt(
            f"{step.folder} is damaged: its {layout.MANIFEST} cannot be understood; choose another "
            "--step"
        )
    if target.exists():
        raise Refused(f"{target} exists: choose another folder with --to")
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        done = 0
        for file in manifest.files:
            done = _pull_file(store, step, file, aside, done, advance)
        source = store.path(layout.CHECKPOINTS, step.folder, layout.MANIFEST)
        with _store_errors(store):
            text = store.files.cat_file(source)
        (aside / layout.MANIFEST).write_bytes(text)
        aside.rename(target)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StoreUnavailable(f"cannot write {error.filename or target}: {reason}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _pull_file(
    store: Store, step: Step, file: layout.StoredFile, aside: Path, done: int, advance: Advance
) -> int:
    """Copy one file below ``aside`` and check it; the bytes done, with those of this file."""
    target = aside / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as output:
        for block in _blocks(store, store.path(layout.CHECKPOINTS, step.folder, file.path)):
            output.write(block)
            digest.update(block)
            size += len(block)
            advance(done + size, step.size)
    if size != file.size or digest.hexdigest() != file.sha256:
        raise CheckpointCorrupt(
            f"{step.folder}/{file.path} is damaged: its size or SHA-256 is not the one in "
            f"{layout.MANIFEST}; choose another --step"
        )
    return done + size


def _blocks(store: Store, path: str) -> Iterator[bytes]:
    """The content of a stored file; what goes wrong in the store is named as such."""
    with _store_errors(store):
        try:
            source = store.files.open(path, "rb", block_size=_CHUNK_BYTES, cache_type="readahead")
        except FileNotFoundError as error:
            raise CheckpointCorrupt(f"{path} is missing: choose another --step") from error
    with source:
        while True:
            with _store_errors(store):
                block = source.read(_CHUNK_BYTES)
            if not block:
                return
            yield bytes(block)


@contextmanager
def _store_errors(store: Store) -> Iterator[None]:
    """StoreUnavailable for what the store or its client raises."""
    try:
        yield
    except PermissionError as error:
        raise StoreUnavailable(
            f"access denied to {store.uri}: check the credentials and that they may list and read "
            f"({_first_line(error)})"
        ) from error
    except OSError as error:
        raise StoreUnavailable(f"cannot read {store.uri}: {_first_line(error)}") from error
    except _client_errors() as error:
        raise StoreUnavailable(f"cannot read {store.uri}: {_first_line(error)}") from error


def _client_errors() -> tuple[type[Exception], ...]:
    """Errors of the S3 client that are no OSError; none where the client is not loaded."""
    if "botocore" not in sys.modules:
        return ()
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError, HttpError


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def default_target(store: Store, step: Step) -> Path:
    """Where ``tempflow pull`` puts a checkpoint unless told."""
    return Path(f"{PurePosixPath(store.root).name}-step-{step.step}")
