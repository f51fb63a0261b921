"""The stored checkpoints of a run, in a local folder or in S3: what is there, and what counts.

What asks the store goes through here, so that it complains in one way. Nothing makes a bucket.
"""

import os
import sys
import uuid
from collections.abc import Iterator, Sequence
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


def open_store(
    uri: str,
    endpoint_url: str | None = None,
    region: str | None = None,
    profile: str | None = None,
) -> Store:
    """The run at ``uri``: a folder, ``file://`` or ``s3://bucket/prefix``.

    The run's own ``checkpoints`` folder is accepted, too. Nothing is read yet. Credentials come
    from ``profile``, else from the environment or the machine's identity.
    """
    trimmed = uri.rstrip("/").removesuffix(f"/{layout.CHECKPOINTS}")
    if trimmed.startswith(_S3):
        return Store(_s3(endpoint_url, region, profile), trimmed.removeprefix(_S3), trimmed)
    if "://" in trimmed and not trimmed.startswith("file://"):
        raise Refused(f"got {uri}: expects a folder, file:///folder or s3://bucket/prefix")
    from fsspec.implementations.local import LocalFileSystem

    root = str(Path(trimmed.removeprefix("file://")).resolve())
    return Store(LocalFileSystem(use_listings_cache=False), root, trimmed)


def require_folder(store: Store) -> None:
    """Refuse a local folder that does not exist; a prefix without objects is an empty run.

    Raises:
        Refused: most likely a slip in the path.
    """
    if not store.uri.startswith(_S3) and not Path(store.root).is_dir():
        raise Refused(f"there is no folder {store.uri}: expects that of a run, such as runs/digits")


def _s3(endpoint_url: str | None, region: str | None, profile: str | None) -> AbstractFileSystem:
    # Late: s3fs takes most of a second to load, and a local folder does not need it.
    from s3fs import S3FileSystem

    settings: dict[str, Any] = {
        # A cached listing hides what another machine has written since.
        "use_listings_cache": False,
        "skip_instance_cache": True,
        # s3fs itself retries five times around this.
        "config_kwargs": {
            "retries": {"max_attempts": 1},
            "connect_timeout": 5,
            "read_timeout": 30,
            # Stores of other makers reject the checksums that newer clients add unasked.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    }
    if endpoint_url:
        settings["endpoint_url"] = endpoint_url
    if profile:
        settings["profile"] = profile
    if region:
        settings["client_kwargs"] = {"region_name": region}
    return S3FileSystem(**settings)


def steps(store: Store) -> list[Step]:
    """Checkpoints that count, oldest first; an empty list where there is none, or no run.

    Which ones count, the highest entry of the run's ledger says: see ``checkpoint_layout``.
    """
    newest = newest_entry(store)
    there = names(store, layout.CHECKPOINTS)
    found = []
    for folder in reversed(layout.committed(there, newest)):
        text = _manifest_text(store, folder.name)
        if text is not None:
            found.append(Step(*folder, folder.name, _manifest(text)))
    return found


def newest_entry(store: Store) -> layout.Entry | None:
    """The entry of the ledger that says what counts; None where nobody ever claimed the run.

    Raises:
        CheckpointCorrupt: it cannot be understood.
    """
    number = layout.newest_entry(names(store, layout.LEDGER))
    if number is None:
        return None
    key = layout.entry_key(number)
    with store_errors(store):
        text = bytes(store.files.cat_file(store.path(key)))
    try:
        return layout.Entry.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointCorrupt(
            f"{store.uri}/{key} is damaged, and it says which checkpoints count; remove it to go "
            "back to the entry before"
        ) from error


def names(store: Store, folder: str) -> list[str]:
    """Names directly below a folder of the run."""
    with store_errors(store):
        try:
            found = store.files.ls(store.path(folder), detail=False)
        except FileNotFoundError as error:
            # A prefix without objects is a run that has stored nothing yet; this is not.
            if "bucket does not exist" in str(error):
                raise StoreUnavailable(f"cannot read {store.uri}: {_first_line(error)}") from error
            return []
        return [PurePosixPath(name).name for name in found]


def _manifest_text(store: Store, folder: str) -> bytes | None:
    with store_errors(store):
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
    with store_errors(store):
        try:
            return bytes(store.files.cat_file(store.path(path)))
        except FileNotFoundError:
            return None


def create(store: Store, path: str, content: bytes) -> bool:
    """Write a file of the run that must be new; False when it exists, which is then unchanged."""
    if _is_local(store):
        return _create_file(Path(store.path(path)), content)
    with store_errors(store, "write to"):
        try:
            store.files.pipe_file(store.path(path), content, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # Not every store words its refusal as s3fs expects.
            if "precondition" in f"{error} {error.__cause__}".lower().replace("-", ""):
                return False
            raise
    return True


def _create_file(target: Path, content: bytes) -> bool:
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        target.parent.mkdir(exist_ok=True)
        partial.write_bytes(content)
        os.link(partial, target)
    except FileExistsError:
        return False
    except OSError as error:
        raise StoreUnavailable(f"cannot write {target}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return True


def delete(store: Store, paths: Sequence[str]) -> None:
    """Remove files of the run, in that order; those that are gone already are no error."""
    for path in paths:
        with store_errors(store, "delete from"):
            try:
                store.files.rm_file(store.path(path))
            except FileNotFoundError:
                continue


def delete_folder(store: Store, folder: str) -> None:
    """Remove a checkpoint, manifest first: without it, it does not exist, however far this gets."""
    paths = sorted(files_below(store, folder), key=lambda path: not path.endswith(layout.MANIFEST))
    delete(store, paths)
    if _is_local(store) and Path(store.path(folder)).is_dir():
        with store_errors(store, "delete from"):
            store.files.rm(store.path(folder), recursive=True)


def files_below(store: Store, folder: str) -> dict[str, int]:
    """Sizes of the files below a folder of the run, by path below the run."""
    with store_errors(store):
        try:
            found = store.files.find(store.path(folder), detail=True)
        except FileNotFoundError:
            return {}
        start = f"{store.root}/"
        return {path.removeprefix(start): int(info["size"]) for path, info in found.items()}


def pinned(store: Store) -> frozenset[str]:
    """Names of the checkpoints' folders that somebody wants kept."""
    return frozenset(
        name.removesuffix(".json") for name in names(store, layout.PINS) if name.endswith(".json")
    )


def _is_local(store: Store) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(store.files, LocalFileSystem)


def find(
    uri: str,
    number: int | None,
    endpoint_url: str | None = None,
    region: str | None = None,
    profile: str | None = None,
) -> tuple[Store, Step]:
    """A checkpoint of the run at ``uri``, or the very one whose folder ``uri`` is.

    The latter is what the status of a job on a cluster names.
    """
    trimmed = uri.rstrip("/")
    run, _, folder = trimmed.rpartition("/")
    if layout.parse_folder(folder) is None:
        store = open_store(uri, endpoint_url, region, profile)
        return store, choose(store, number)
    store = open_store(run, endpoint_url, region, profile)
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


@contextmanager
def store_errors(store: Store, action: str = "read") -> Iterator[None]:
    """StoreUnavailable for what the store or its client raises."""
    try:
        yield
    except PermissionError as error:
        raise StoreUnavailable(
            f"access denied to {store.uri}: check the credentials and that they may do this "
            f"({_first_line(error)})"
        ) from error
    except OSError as error:
        raise StoreUnavailable(f"cannot {action} {store.uri}: {_first_line(error)}") from error
    except _client_errors() as error:
        raise StoreUnavailable(f"cannot {action} {store.uri}: {_first_line(error)}") from error


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
