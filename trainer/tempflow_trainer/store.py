"""Where checkpoints are kept: a folder, or a prefix in S3 or a store like it.

Both write a key whole or not at all, can create a key only if it is new, and list what is there
now. S3 gets no listings cache (it has no expiry) and no mkdir (it would create the bucket).
"""

import copy
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import s3fs
from botocore import exceptions as boto
from fsspec.exceptions import FSTimeoutError

from tempflow_api.errors import StoreUnavailable
from tempflow_api.storage import Checkpoint
from tempflow_trainer.store_base import Patient, Store, StoreSilent

log = logging.getLogger(__name__)


def open_store(checkpoint: Checkpoint, run_folder: str, default_root: Path) -> Store:
    """The store of one run, ``run_folder`` below ``checkpoint.uri`` (or below ``default_root``)."""
    root = (checkpoint.uri or str(default_root)).rstrip("/")
    return open_at(f"{root}/{run_folder}", checkpoint)


def open_at(uri: str, checkpoint: Checkpoint) -> Store:
    """The store at a full address, reached as ``spec.checkpoint`` says."""
    if not uri.startswith("s3://"):
        return FolderStore(Path(uri.removeprefix("file://")))
    return S3Store(uri, endpoint_url=checkpoint.endpoint_url, region=checkpoint.region)


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

    def get(self, key: str, file: Path, size: int) -> str:
        del size
        digest = hashlib.sha256()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with (self._root / key).open("rb") as source, file.open("wb") as output:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    output.write(block)
        except OSError as error:
            raise self._unavailable("read", key, error) from error
        return digest.hexdigest()

    def read(self, key: str) -> bytes:
        try:
            return (self._root / key).read_bytes()
        except OSError as error:
            raise self._unavailable("read", key, error) from error

    def read_range(self, key: str, start: int, length: int) -> bytes:
        try:
            with (self._root / key).open("rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise self._unavailable("read", key, error) from error

    def below(self, folder: str) -> Store:
        return FolderStore(self._root / folder)

    def folders(self, prefix: str) -> list[str]:
        try:
            found = (self._root / prefix).iterdir()
            return sorted(path.name for path in found if path.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unavailable("list", prefix, error) from error

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


_BLOCK_BYTES = 1 << 20


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# No credentials, no answer, out of time: s3fs translates only what the store itself says.
_REFUSALS = (OSError, boto.BotoCoreError, FSTimeoutError)
_PART_BYTES, _PARTS_IN_FLIGHT = 16 << 20, 8
"""A large file travels in parts: 128 MiB of memory at most."""
_REQUEST_SECONDS = 900.0
"""A request that is part of nothing with a deadline of its own is over by then."""
_ABORT_SECONDS = 10.0
"""For a request that cleans up, when the time of what it cleans up after is used."""
_CONFLICTS = 5
"""Times that a store may ask to repeat a conditional write because another one ran beside it."""


def in_order(
    pool: ThreadPoolExecutor, action: Callable[[int], bytes], starts: Sequence[int]
) -> Iterator[bytes]:
    """What the action returns for each, in order; memory holds as many as may be in flight."""
    ahead: deque[Future[bytes]] = deque()
    for start in starts:
        if len(ahead) == _PARTS_IN_FLIGHT:
            yield ahead.popleft().result()
        ahead.append(pool.submit(action, start))
    while ahead:
        yield ahead.popleft().result()


def _said(error: Exception) -> str:
    """What s3fs says, and what the store itself said: only the latter has the code."""
    return f"{error} {error.__cause__ or ''}"


def _is_silence(error: Exception) -> bool:
    """Whether time alone may cure it: no connection, no answer in time, a server's own error."""
    if isinstance(error, boto.SSLError):
        return False
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError | FSTimeoutError):
        return True
    said = error.__cause__
    if not isinstance(said, boto.ClientError):
        return False
    code = int(said.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return code >= 500 and code != HTTPStatus.NOT_IMPLEMENTED


_REMEDIES = {
    "RequestTimeTooSkewed": "this machine's clock differs too much from the store's: set it",
    "ExpiredToken": "the credentials have expired: renew them",
    "CERTIFICATE_VERIFY_FAILED": "nobody here knows who signed its certificate: name a file "
    "with the certificate authority in AWS_CA_BUNDLE",
}
_REMEDY = (
    "check that the bucket exists, that the credentials allow it, and spec.checkpoint.endpointUrl"
)
_REMEDY_OF_SILENCE = (
    "the store is out of reach, overloaded or slow: see that it runs, and check "
    "spec.checkpoint.endpointUrl; a save waits for it for spec.checkpoint.saveTimeoutSeconds"
)


class S3Store(Store):
    """Objects below a prefix, through s3fs; credentials by the standard chain."""

    def __init__(self, uri: str, *, endpoint_url: str | None, region: str | None) -> None:
        self.uri = uri
        self._root = uri.removeprefix("s3://")
        self._until: float | None = None
        self._fs = s3fs.S3FileSystem(
            endpoint_url=endpoint_url,
            client_kwargs={"region_name": region} if region else {},
            # Stores of other makers reject the checksums that newer clients add unasked.
            config_kwargs={
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "retries": {"max_attempts": 3, "mode": "standard"},
                # A part that travels slowly is not a store that hangs.
                "connect_timeout": 10,
                "read_timeout": 60,
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def within(self, seconds: float) -> Store:
        limited = copy.copy(self)
        limited._until = time.monotonic() + seconds
        return Patient(limited, limited._until)

    def _seconds(self) -> float:
        """What is left for a request."""
        if self._until is None:
            return _REQUEST_SECONDS
        return max(self._until - time.monotonic(), 0.001)

    def put(self, file: Path, key: str) -> None:
        try:
            self._fs.put_file(
                str(file),
                f"{self._root}/{key}",
                chunksize=_PART_BYTES,
                max_concurrency=_PARTS_IN_FLIGHT,
                timeout=self._seconds(),
            )
        except _REFUSALS as error:
            if isinstance(error, FSTimeoutError):
                self._abort_uploads(key)
            raise self._unavailable("write", key, error) from error

    def _abort_uploads(self, key: str) -> None:
        """Parts of a file that ran out of time, which would be billed: s3fs removes them after
        other errors only."""
        bucket, _, path = f"{self._root}/{key}".partition("/")
        call, seconds = self._fs.call_s3, _ABORT_SECONDS
        try:
            found = call("list_multipart_uploads", Bucket=bucket, Prefix=path, timeout=seconds)
            for upload in found.get("Uploads", []):
                if upload["Key"] == path:
                    place = {"Bucket": bucket, "Key": path, "UploadId": upload["UploadId"]}
                    call("abort_multipart_upload", **place, timeout=seconds)
        except _REFUSALS as error:
            log.warning("parts of %s/%s may remain: %s", self.uri, key, _said(error))

    def create(self, key: str, content: bytes) -> bool:
        for conflict in range(_CONFLICTS):
            try:
                self._fs.pipe_file(
                    f"{self._root}/{key}", content, mode="create", timeout=self._seconds()
                )
            except FileExistsError:
                return False
            except _REFUSALS as error:
                text = _said(error).lower()
                # Not every store words its refusal as s3fs expects.
                if "precondition" in text or "pre-condition" in text:
                    return False
                if "conditional" in text and conflict + 1 < _CONFLICTS:
                    time.sleep(0.1 * 2**conflict)
                    continue
                raise self._unavailable("write", key, error) from error
            return True
        raise AssertionError("every way through the loop ends it")

    def get(self, key: str, file: Path, size: int) -> str:
        """Several parts at a time, as one connection is slower than the line; each is hashed while
        the next ones travel."""
        path, digest = f"{self._root}/{key}", hashlib.sha256()

        def fetch(start: int) -> bytes:
            end, left = min(start + _PART_BYTES, size), self._seconds()
            block = bytes(self._fs.cat_file(path, start=start, end=end, timeout=left))
            os.pwrite(output.fileno(), block, start)
            return block

        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as output, ThreadPoolExecutor(_PARTS_IN_FLIGHT) as pool:
                for block in in_order(pool, fetch, range(0, size, _PART_BYTES)):
                    digest.update(block)
        except _REFUSALS as error:
            raise self._unavailable("read", key, error) from error
        return digest.hexdigest()

    def read(self, key: str) -> bytes:
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{key}", timeout=self._seconds()))
        except _REFUSALS as error:
            raise self._unavailable("read", key, error) from error

    def read_range(self, key: str, start: int, length: int) -> bytes:
        path, end = f"{self._root}/{key}", start + length
        try:
            found = self._fs.cat_file(path, start=start, end=end, timeout=self._seconds())
        except _REFUSALS as error:
            if "InvalidRange" in _said(error):  # it begins where the key has ended
                return b""
            raise self._unavailable("read", key, error) from error
        return bytes(found)

    def below(self, folder: str) -> Store:
        inner = copy.copy(self)
        inner.uri, inner._root = f"{self.uri}/{folder}", f"{self._root}/{folder}"
        return inner

    def folders(self, prefix: str) -> list[str]:
        try:
            found = self._fs.ls(
                f"{self._root}/{prefix}".rstrip("/"), detail=True, timeout=self._seconds()
            )
        except FileNotFoundError:
            return []
        except _REFUSALS as error:
            raise self._unavailable("list", prefix, error) from error
        names = (Path(info["name"]).name for info in found if info["type"] == "directory")
        return sorted(names)

    def find(self, prefix: str) -> dict[str, int]:
        # Not s3fs's own: it asks more, and takes what some stores keep of empty folders for a file.
        bucket, _, root = f"{self._root}/".partition("/")
        start = f"{root}{prefix}"
        found: dict[str, int] = {}
        page: dict[str, str] = {}
        try:
            while True:
                answer = self._fs.call_s3(
                    "list_objects_v2",
                    Bucket=bucket,
                    Prefix=start,
                    **page,
                    timeout=self._seconds(),
                )
                for item in answer.get("Contents", []):
                    found[item["Key"]] = int(item["Size"])
                if not answer.get("IsTruncated"):
                    break
                page = {"ContinuationToken": answer["NextContinuationToken"]}
        except _REFUSALS as error:
            raise self._unavailable("list", prefix, error) from error
        inside = start if start.endswith("/") else f"{start}/"
        return {
            key.removeprefix(root): size
            for key, size in found.items()
            if (key == start or key.startswith(inside)) and not key.endswith("/")
        }

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            try:
                self._fs.rm_file(f"{self._root}/{key}", timeout=self._seconds())
            except FileNotFoundError:
                continue
            except _REFUSALS as error:
                raise self._unavailable("delete", key, error) from error

    def _probe_created(self, key: str) -> None:
        super()._probe_created(key)
        parts = f"{key}-parts"
        bucket, _, path = f"{self._root}/{parts}".partition("/")
        try:
            # What a large file does, with the one part that may be small.
            call, place = self._fs.call_s3, {"Bucket": bucket, "Key": path}
            upload = call("create_multipart_upload", **place)["UploadId"]
            tag = call("upload_part", **place, UploadId=upload, PartNumber=1, Body=b"part")["ETag"]
            listed = {"Parts": [{"PartNumber": 1, "ETag": tag}]}
            call("complete_multipart_upload", **place, UploadId=upload, MultipartUpload=listed)
        except _REFUSALS as error:
            raise self._unavailable("write in parts", parts, error) from error
        try:
            if self.read(parts) != b"part":
                raise StoreUnavailable(f"{self.uri}: what was written in parts reads differently")
        finally:
            self.delete([parts])

    def _unavailable(self, action: str, key: str, error: Exception) -> StoreUnavailable:
        reason = str(error) or type(error).__name__
        if isinstance(error, FSTimeoutError):
            reason = "it took longer than it may"
        silent = _is_silence(error)
        remedy = next(
            (remedy for name, remedy in _REMEDIES.items() if name in _said(error)),
            _REMEDY_OF_SILENCE if silent else _REMEDY,
        )
        kind = StoreSilent if silent else StoreUnavailable
        return kind(f"cannot {action} {self.uri}/{key}: {reason}; {remedy}")
