"""Copies of models from an object store: one download a node, whoever else wants the same.

::

    <cache>/
      bucket--prefix.lock          held by the process that copies
      bucket--prefix.partial/      what there is so far; the next one goes on from here
      bucket--prefix/              whole

Processes of one node and pods that share a volume wait for the one that copies. A file is renamed
to its name when it is whole and its digest is the store's.
"""

import fcntl
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tempflow_api.errors import ModelUnavailable

_CHUNK = 1 << 20


def fetch(
    filesystem: Any, source: str, prefix: str, cache: Path, patterns: Sequence[str] = ("*",)
) -> Path:
    """The folder with a copy of all objects below ``prefix``, which ``source`` names for people.

    ``patterns`` of names leave the others out; whoever wants other ones takes another cache.

    Raises:
        ModelUnavailable: nothing is there, or a copy is not what the store says it is.
        OSError: store or disk fail; what has arrived is kept for the next try.
    """
    target = cache / prefix.strip("/").replace("/", "--")
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with _held(target.with_name(f"{target.name}.lock")):
        if target.is_dir():  # by whom this process has waited for
            return target
        found: dict[str, dict[str, Any]] = filesystem.find(prefix, detail=True)
        if not found:
            raise ModelUnavailable(f"spec.model.source: there is nothing at {source}")
        partial = target.with_name(f"{target.name}.partial")
        for key, about in found.items():
            name = key.removeprefix(prefix).lstrip("/")
            if any(fnmatch(name, pattern) for pattern in patterns):
                _copy(filesystem, key, about, partial / name)
        partial.rename(target)
    return target


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    """The kernel lets go of the lock when its holder dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(filesystem: Any, key: str, about: dict[str, Any], file: Path) -> None:
    size = int(about["size"])
    if file.is_file() and file.stat().st_size == size:
        return  # whole, or it would have another name
    file.parent.mkdir(parents=True, exist_ok=True)
    arriving = file.with_name(f"{file.name}.arriving")
    have = arriving.stat().st_size if arriving.is_file() else 0
    if have > size:
        arriving.unlink()
        have = 0
    with arriving.open("ab") as out:
        while have < size:
            chunk = filesystem.cat_file(key, start=have, end=min(have + _CHUNK, size))
            out.write(chunk)
            have += len(chunk)
    _check(arriving, key, str(about.get("ETag", "")).strip('"'))
    arriving.rename(file)


def _check(file: Path, key: str, tag: str) -> None:
    """The tag of an object that was uploaded in one piece is its MD5; of others nobody knows."""
    if len(tag) != 32:
        return
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False))
    if digest.hexdigest() != tag:
        file.unlink()
        raise ModelUnavailable(
            f"spec.model.source: the copy of {key} has digest {digest.hexdigest()}, the store says "
            f"{tag}: it was damaged on its way; try again"
        )
