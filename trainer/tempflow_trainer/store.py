"""Where checkpoints are kept: a folder, or a prefix in S3 or a store like it.

Both write a key whole or not at all, can create a key only if it is new, and list what is there
now. S3 gets no listings cache (it has no expiry) and no mkdir (it would create the bucket).
"""

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs
from botocore.exceptions import BotoCoreError

from tempflow_api.errors import StoreUnavailable
from tempflow_api.v1alpha1 import Checkpoint


class Store(ABC):
    """Keys are relative paths with forward slashes. Every method raises StoreUnavailable."""

    uri: str

    @abstractmethod
    def put(self, file: Path, key: str) -> None:
        """Write the content of a local file."""

    @abstractmethod
    def create(self, key: str, content: bytes) -> bool:
        """Write a key that must be new; False when it exists, which is then unchanged."""

    @abstractmethod
    def get(self, key: str, file: Path) -> None:
        """Copy into a local file."""

    @abstractmethod
    def find(self, prefix: str) -> dict[str, int]:
        """Sizes by key of everything below ``prefix``, now."""

    @abstractmethod
    def delete(self, keys: list[str]) -> None:
        """Remove the keys, in that order; those that are gone already are no error."""

    def probe(self) -> None:
        """Write, list, read and delete a key: what a run needs, asked for before it starts."""
        key = f".probe-{uuid.uuid4().hex}"
        if not self.create(key, b"probe"):
            raise StoreUnavailable(f"{self.uri}: a fresh key exists already")
        if self.find(key) != {key: len(b"probe")}:
            raise StoreUnavailable(f"{self.uri}: a key that was written is not listed")
        self.delete([key])


def open_store(checkpoint: Checkpoint, run_folder: str, default_root: Path) -> Store:
    """The store of one run, ``run_folder`` below ``checkpoint.uri`` (or below ``default_root``)."""
    uri = checkpoint.uri or str(default_root)
    if not uri.startswith("s3://"):
        return FolderStore(Path(uri.removeprefix("file://")) / run_folder)
    return S3Store(
        f"{uri.rstrip('/')}/{run_folder}",
        endpoint_url=checkpoint.endpoint_url,
        region=checkpoint.region,
    )


class FolderStore(Store):
    """Files below a folder; each appears by a rename or a link of a finished one."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self.uri = str(self._root)

    def put(self, file: Path, key: str) -> None:
        try:
            with self._partial(key) as partial:
                shutil.copyfile(file, partial)
                _flush(partial)
                partial.replace(self._root / key)
        except OSError as error:
            raise self._unavailable("write", key, error) from error

    def create(self, key: str, content: bytes) -> bool:
        try:
            with self._partial(key) as partial:
                partial.write_bytes(content)
                _flush(partial)
                try:
                    os.link(partial, self._root / key)
                except FileExistsError:
                    return False
        except OSError as error:
            raise self._unavailable("write", key, error) from error
        return True

    def get(self, key: str, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._root / key, file)
        except OSError as error:
            raise self._unavailable("read", key, error) from error

    def find(self, prefix: str) -> dict[str, int]:
        try:
            start = self._root / prefix
            files = [start] if start.is_file() else sorted(start.rglob("*"))
            return {
                file.relative_to(self._root).as_posix(): file.stat().st_size
                for file in files
                if file.is_file() and not file.name.endswith(".partial")
            }
        except OSError as error:
            raise self._unavailable("list", prefix, error) from error

    def delete(self, keys: list[str]) -> None:
        try:
            for key in keys:
                (self._root / key).unlink(missing_ok=True)
            for folder in sorted({(self._root / key).parent for key in keys}, reverse=True):
                if folder != self._root and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        except OSError as error:
            raise self._unavailable("delete", keys[0], error) from error

    @contextmanager
    def _partial(self, key: str) -> Iterator[Path]:
        """A name beside the key's file to write to first; nothing of it remains."""
        target = self._root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def _unavailable(self, action: str, key: str, error: OSError) -> StoreUnavailable:
        return StoreUnavailable(f"cannot {action} {self._root / key}: {error.strerror or error}")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# No credentials, no answer: s3fs translates only what the store itself says.
_REFUSALS = (OSError, BotoCoreError)


class S3Store(Store):
    """Objects below a prefix, through s3fs; credentials by the standard chain."""

    def __init__(self, uri: str, *, endpoint_url: str | None, region: str | None) -> None:
        self.uri = uri
        self._root = uri.removeprefix("s3://")
        self._fs = s3fs.S3FileSystem(
            endpoint_url=endpoint_url,
            client_kwargs={"region_name": region} if region else {},
            # Stores of other makers reject the checksums that newer clients add unasked.
            config_kwargs={
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "retries": {"max_attempts": 3, "mode": "standard"},
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def put(self, file: Path, key: str) -> None:
        try:
            self._fs.put_file(str(file), f"{self._root}/{key}")
        except _REFUSALS as error:
            raise self._unavailable("write", key, error) from error

    def create(self, key: str, content: bytes) -> bool:
        try:
            self._fs.pipe_file(f"{self._root}/{key}", content, mode="create")
        except FileExistsError:
            return False
        except _REFUSALS as error:
            # Not every store words its refusal as s3fs expects.
            if "condition" in str(error).lower():
                return False
            raise self._unavailable("write", key, error) from error
        return True

    def get(self, key: str, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(f"{self._root}/{key}", str(file))
        except _REFUSALS as error:
            raise self._unavailable("read", key, error) from error

    def find(self, prefix: str) -> dict[str, int]:
        try:
            found = self._fs.find(f"{self._root}/{prefix}", detail=True)
        except _REFUSALS as error:
            raise self._unavailable("list", prefix, error) from error
        return {
            key.removeprefix(f"{self._root}/"): int(info["size"]) for key, info in found.items()
        }

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            try:
                self._fs.rm_file(f"{self._root}/{key}")
            except FileNotFoundError:
                continue
            except _REFUSALS as error:
                raise self._unavailable("delete", key, error) from error

    def _unavailable(self, action: str, key: str, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(
            f"cannot {action} {self.uri}/{key}: {error}; check that the bucket exists, that the "
            "credentials allow it, and spec.checkpoint.endpointUrl"
        )
