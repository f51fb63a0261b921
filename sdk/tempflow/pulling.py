"""Checkpoints copied here, and checked where they are.

A file is fetched in ranges, several at a time, over all files at once. What has arrived is noted
beside it, so a transfer that broke goes on where it was; the digest of the whole file decides.
"""

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from tempflow.checkpoints import Step, Store, store_errors
from tempflow.refused import Refused
from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import CheckpointCorrupt, StoreUnavailable

RANGE_BYTES, RANGES_AT_ONCE = 8 << 20, 8
"""64 MiB of memory at most; one connection alone is slower than the line."""

Form = Literal["lora", "full", "state"]
"""``lora`` and ``full``: the folder that diffusers loads; ``state``: the whole checkpoint."""
_FOLDERS = {"lora": layout.ADAPTER, "full": layout.TRANSFORMER}

Advance = Callable[[int, int], None]
"""Told the bytes that are there so far and their total."""


def _ignore(_done: int, _total: int) -> None:
    """For a caller that wants to see no progress."""


class _Count:
    """Bytes so far, told by several threads."""

    def __init__(self, total: int, advance: Advance) -> None:
        self._done, self._total, self._advance = 0, total, advance
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._advance(self._done, self._total)


def default_target(store: Store, step: Step) -> Path:
    """Where ``tempflow pull`` puts a checkpoint unless told."""
    return Path(f"{PurePosixPath(store.root).name}-step-{step.step}")


def files_of(step: Step, form: Form) -> list[layout.StoredFile]:
    """The files of a checkpoint that are wanted.

    Raises:
        CheckpointCorrupt: its manifest cannot be understood.
        Refused: the run has a result of the other kind.
    """
    manifest = sound_manifest(step)
    folder = _FOLDERS.get(form)
    if folder is None:
        return manifest.files
    found = [file for file in manifest.files if file.path.startswith(f"{folder}/")]
    if not found:
        other = next((f for f, kind in _FOLDERS.items() if kind == step.result), "state")
        raise Refused(
            f"{step.folder} holds no {folder}/: the run trains another kind of weights; "
            f"choose --format {other}"
        )
    return found


def sound_manifest(step: Step) -> layout.CheckpointManifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointCorrupt: it cannot be understood.
    """
    if step.manifest is None:
        raise CheckpointCorrupt(
            f"{step.folder} is damaged: its {layout.MANIFEST} cannot be understood; choose another "
            "--step"
        )
    return step.manifest


def pull(
    store: Store,
    step: Step,
    target: Path,
    advance: Advance = _ignore,
    form: Form = "state",
) -> Path:
    """Copy a checkpoint to the new folder ``target``, which appears only when all of it is there
    and every digest is right.

    What a broken transfer left lies beside it, in a hidden folder, and the next one goes on with
    that.

    Raises:
        Refused: ``target`` exists, another transfer to it is under way, or the run has no such
            result.
        CheckpointCorrupt: a file is missing or not what the manifest says.
        StoreUnavailable: the store refuses, or the local disk.
    """
    files = files_of(step, form)
    if target.exists():
        raise Refused(f"{target} exists: choose another folder with --to")
    aside = target.with_name(f".{target.name}.partial-{step.folder}-{form}")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        with _alone(aside):
            _keep_only_of(step, aside)
            _fetch(store, step, files, aside, advance)
            _arrange(store, step, aside, form)
            aside.rename(target)
    except CheckpointCorrupt:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StoreUnavailable(f"cannot write {error.filename or target}: {reason}") from error
    return target


@contextmanager
def _alone(aside: Path) -> Iterator[None]:
    """Two transfers to one place would spoil each other's files."""
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"{aside} is being written by another pull: wait for it") from error
        yield
    finally:
        os.close(descriptor)


_NONCE = ".save"


def _keep_only_of(step: Step, aside: Path) -> None:
    """Begin anew where what is there is of another save, of a run that had the same name."""
    nonce = sound_manifest(step).nonce
    mark = aside / _NONCE
    if mark.is_file() and mark.read_text() == nonce:
        return
    for entry in aside.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    mark.write_text(nonce)


def _arrange(store: Store, step: Step, aside: Path, form: Form) -> None:
    """Of a result alone, its files at the top, as diffusers wants them."""
    (aside / _NONCE).unlink()
    folder = _FOLDERS.get(form)
    if folder is None:
        with store_errors(store):
            text = store.files.cat_file(
                store.path(layout.CHECKPOINTS, step.folder, layout.MANIFEST)
            )
        (aside / layout.MANIFEST).write_bytes(text)
        return
    inner = (aside / folder).rename(aside / f".{folder}")
    for entry in inner.iterdir():
        entry.rename(aside / entry.name)
    inner.rmdir()


@dataclass(frozen=True)
class _Part:
    """A file on its way: its content so far, and the numbers of the ranges that are in it."""

    stored: layout.StoredFile
    target: Path

    @property
    def content(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part")

    @property
    def journal(self) -> Path:
        return self.target.with_name(f"{self.target.name}.ranges")

    def missing(self) -> list[int]:
        count = -(-self.stored.size // RANGE_BYTES)
        there: set[int] = set()
        if self.journal.is_file() and self.content.is_file():
            whole, _, _ = self.journal.read_text().rpartition("\n")
            there = {int(line) for line in whole.splitlines() if line.isdigit()}
        return [n for n in range(count) if n not in there]

    def length(self, number: int) -> int:
        return min(RANGE_BYTES, self.stored.size - number * RANGE_BYTES)


def _fetch(
    store: Store,
    step: Step,
    files: Sequence[layout.StoredFile],
    aside: Path,
    advance: Advance,
) -> None:
    count = _Count(sum(file.size for file in files), advance)
    parts = [_Part(file, aside / file.path) for file in files]
    wanted: list[tuple[_Part, int]] = []
    for part in parts:
        part.target.parent.mkdir(parents=True, exist_ok=True)
        if part.target.is_file():
            count.add(part.stored.size)
            continue
        missing = part.missing()
        count.add(part.stored.size - sum(map(part.length, missing)))
        part.content.touch()
        wanted += [(part, number) for number in missing]

    def fetch(item: tuple[_Part, int]) -> None:
        _fetch_range(store, step, *item)
        count.add(item[0].length(item[1]))

    pool = ThreadPoolExecutor(RANGES_AT_ONCE)
    try:
        list(pool.map(fetch, wanted))
    finally:
        pool.shutdown(cancel_futures=True)
    for part in parts:
        _check(store, step, part)


def _fetch_range(store: Store, step: Step, part: _Part, number: int) -> None:
    path = store.path(layout.CHECKPOINTS, step.folder, part.stored.path)
    start, length = number * RANGE_BYTES, part.length(number)
    block = _read_range(store, path, start, length)
    if len(block) != length:
        raise _damaged(step, part.stored)
    with part.content.open("r+b") as output:
        os.pwrite(output.fileno(), block, start)
    with part.journal.open("a") as journal:
        journal.write(f"{number}\n")


def _read_range(store: Store, path: str, start: int, length: int) -> bytes:
    with store_errors(store):
        try:
            return bytes(store.files.cat_file(path, start=start, end=start + length))
        except FileNotFoundError as error:
            raise CheckpointCorrupt(f"{path} is missing: choose another --step") from error
        except OSError as error:
            # Asked for what lies behind the end of a file that was cut.
            if "InvalidRange" in f"{error} {error.__cause__}" or "not satisfiable" in str(error):
                return b""
            raise


def _check(store: Store, step: Step, part: _Part) -> None:
    """Digest and size of a file that has arrived; then it gets its name."""
    source = part.target if part.target.is_file() else part.content
    digest = hashlib.sha256()
    with source.open("rb") as content:
        while block := content.read(RANGE_BYTES):
            digest.update(block)
    longer = store_size(store, step, part.stored) != part.stored.size
    if longer or digest.hexdigest() != part.stored.sha256:
        raise _damaged(step, part.stored)
    source.rename(part.target)
    part.journal.unlink(missing_ok=True)


def store_size(store: Store, step: Step, file: layout.StoredFile) -> int:
    """Bytes that a file of a checkpoint has in the store.

    Raises:
        CheckpointCorrupt: it is missing.
    """
    path = store.path(layout.CHECKPOINTS, step.folder, file.path)
    with store_errors(store):
        try:
            return int(store.files.info(path)["size"])
        except FileNotFoundError as error:
            raise CheckpointCorrupt(f"{path} is missing: choose another --step") from error


def _damaged(step: Step, file: layout.StoredFile) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        f"{step.folder}/{file.path} is damaged: its size or SHA-256 is not the one in "
        f"{layout.MANIFEST}; choose another --step"
    )


def verify(store: Store, steps: Sequence[Step], advance: Advance = _ignore) -> dict[str, list[str]]:
    """Read every file of the checkpoints and compare size and digest; nothing is written here.

    Returns:
        What is wrong with each, by its folder's name; an empty list where nothing is.

    Raises:
        StoreUnavailable: the store does not answer; that says nothing about a checkpoint.
    """
    count = _Count(sum(step.size for step in steps), advance)
    wrong: dict[str, list[str]] = {}
    for step in steps:
        found = wrong.setdefault(step.folder, [])
        if step.manifest is None:
            found.append(f"{layout.MANIFEST} cannot be understood")
            continue
        with ThreadPoolExecutor(RANGES_AT_ONCE) as pool:
            verdicts = pool.map(partial(_verify, store, step, count), step.manifest.files)
            found += [verdict for verdict in verdicts if verdict]
    return wrong


def _verify(store: Store, step: Step, count: _Count, file: layout.StoredFile) -> str:
    path = store.path(layout.CHECKPOINTS, step.folder, file.path)
    digest = hashlib.sha256()
    try:
        size = store_size(store, step, file)
        if size != file.size:
            return f"{file.path}: {size} bytes, expected {file.size}"
        for start in range(0, file.size, RANGE_BYTES):
            block = _read_range(store, path, start, min(RANGE_BYTES, file.size - start))
            digest.update(block)
            count.add(len(block))
    except CheckpointCorrupt:
        return f"{file.path}: missing"
    return "" if digest.hexdigest() == file.sha256 else f"{file.path}: another SHA-256"
