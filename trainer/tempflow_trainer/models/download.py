"""Copies of models, from an object store or the hub: one download a node, each file checked.

The hub's own client copies, and locks; this module does so for an object store::

    <cache>/
      bucket--prefix-1a2b3c4d.lock          held by the process that copies
      bucket--prefix-1a2b3c4d.partial/      what there is so far; the next one goes on from here
      bucket--prefix-1a2b3c4d/              whole

The digits are of the prefix's digest: ``a/b`` and ``a--b`` are two. Processes of one node and pods
that share a volume wait for the one that copies. A file is renamed to its name when it is whole and
its digest is the store's. What has arrived of an object bears the object's tag, so that one which
was replaced meanwhile begins anew.
"""

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from tempflow_api.errors import ModelUnavailable

log = logging.getLogger(__name__)

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
    target = cache / folder_of(prefix)
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


def check_hub_files(snapshot: Path) -> None:
    """Compare large files in the hub's cache with their names, which are their SHA-256.

    Each is read once: what was whole is noted beside the files. A cache that cannot be written to
    was filled, and so checked, by somebody else.

    Raises:
        ModelUnavailable: a file is another one; it is deleted, so that the next try asks again.
        OSError: the disk fails.
    """
    repository = snapshot.parents[1]
    if not os.access(repository, os.W_OK):
        return
    checked = repository / "checked"
    checked.mkdir(exist_ok=True)
    with _held(repository / "checked.lock"):
        files = {path: path.resolve() for path in sorted(snapshot.rglob("*")) if path.is_file()}
        new = {
            file: blob
            for file, blob in files.items()
            if re.fullmatch("[0-9a-f]{64}", blob.name) and not (checked / blob.name).exists()
        }
        if new:
            size = sum(blob.stat().st_size for blob in new.values())
            log.info("compares %d files, %d MiB, with the hub's digests", len(new), size >> 20)
        for file, blob in new.items():
            with blob.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if found != blob.name:
                blob.unlink()
                file.unlink()
                raise ModelUnavailable(
                    f"its {file.relative_to(snapshot)} was damaged on its way: the copy is not "
                    "what the hub has; try again"
                )
            (checked / blob.name).touch()


def folder_of(prefix: str) -> str:
    """Where the copy of a prefix lies in a cache."""
    name = prefix.strip("/")
    return f"{name.replace('/', '--')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


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
    tag = str(about.get("ETag", "")).strip('"')
    arriving = file.with_name(f"{file.name}.{tag}.arriving")
    for stale in set(file.parent.glob(f"{escape(file.name)}.*.arriving")) - {arriving}:
        stale.unlink()
    have = arriving.stat().st_size if arriving.is_file() else 0
    with arriving.open("ab") as out:
        while have < size:
            chunk = filesystem.cat_file(key, start=have, end=min(have + _CHUNK, size))
            out.write(chunk)
            have += len(chunk)
    _check(filesystem, arriving, key, tag)
    arriving.rename(file)


def _check(filesystem: Any, file: Path, key: str, tag: str) -> None:
    """An object's tag is its MD5, or that of the MD5 of the parts in which it was uploaded; not
    where a key of its own encrypts it, of which nobody outside the store knows a digest."""
    expected, _, parts = tag.partition("-")
    if len(expected) != hashlib.md5(usedforsecurity=False).digest_size * 2:
        return
    bucket, _, path = key.partition("/")

    def part(number: int) -> dict[str, Any]:
        told: dict[str, Any] = filesystem.call_s3(
            "head_object", Bucket=bucket, Key=path, PartNumber=number
        )
        return told

    first, size = part(1), file.stat().st_size
    if str(first.get("ServerSideEncryption", "")).startswith("aws:kms"):
        return
    if not parts:
        found = _tag_of(file, None)
    elif (each := int(first["ContentLength"])) >= size and int(parts) > 1:
        return  # a store that says nothing of parts
    else:
        # Nearly all programs upload parts of one size; asking for each takes a request a part.
        found = _tag_of(file, [each] * int(parts))
        if found != tag:
            sizes = [int(part(number)["ContentLength"]) for number in range(1, int(parts) + 1)]
            found = _tag_of(file, sizes)
    if found != tag:
        file.unlink()
        raise ModelUnavailable(
            f"spec.model.source: the copy of {key} has digest {found}, the store says {tag}: it "
            "was damaged on its way; try again"
        )


def _tag_of(file: Path, parts: Sequence[int] | None) -> str:
    """As S3 computes it; ``parts`` in bytes, the last one may be shorter; None where there are
    none."""
    with file.open("rb") as content:
        if parts is None:
            return hashlib.file_digest(
                content, lambda: hashlib.md5(usedforsecurity=False)
            ).hexdigest()
        whole = hashlib.md5(usedforsecurity=False)
        for size in parts:
            whole.update(hashlib.md5(content.read(size), usedforsecurity=False).digest())
    return f"{whole.hexdigest()}-{len(parts)}"
