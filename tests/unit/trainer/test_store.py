"""Both kinds of stores keep the same promises."""

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tempflow_api.errors import StoreUnavailable
from tempflow_api.storage import Checkpoint
from tempflow_trainer.store import FolderStore, S3Store, in_order, open_store
from tempflow_trainer.store_base import Patient, Store, StoreSilent, when_it_answers


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "local" / "file.bin"
    path.parent.mkdir()
    path.write_bytes(b"content")
    return path


def content(store: Store, key: str, tmp_path: Path) -> bytes:
    target = tmp_path / "read" / "deep" / "copy.bin"
    digest = store.get(key, target, store.find(key)[key])
    assert digest == hashlib.sha256(target.read_bytes()).hexdigest()
    return target.read_bytes()


def test_what_is_put_can_be_listed_and_read(store: Store, file: Path, tmp_path: Path) -> None:
    store.put(file, "a/b/one.bin")
    store.put(file, "a/two.bin")
    assert store.find("a") == {"a/b/one.bin": 7, "a/two.bin": 7}
    assert store.find("a/b") == {"a/b/one.bin": 7}
    assert content(store, "a/b/one.bin", tmp_path) == b"content"


def test_a_put_replaces_what_was_there(store: Store, file: Path, tmp_path: Path) -> None:
    store.put(file, "key")
    file.write_bytes(b"newer")
    store.put(file, "key")
    assert content(store, "key", tmp_path) == b"newer"
    assert store.find("key") == {"key": 5}


def test_a_key_is_created_once(store: Store, tmp_path: Path) -> None:
    assert store.create("checkpoints/x/MANIFEST.json", b"first")
    assert not store.create("checkpoints/x/MANIFEST.json", b"second")
    assert content(store, "checkpoints/x/MANIFEST.json", tmp_path) == b"first"
    assert store.find("checkpoints") == {"checkpoints/x/MANIFEST.json": 5}


def test_nothing_is_found_where_nothing_is(store: Store) -> None:
    assert store.find("checkpoints") == {}


def test_a_listing_sees_what_another_process_wrote(
    new_store: Callable[[str], Store], file: Path
) -> None:
    one, other = new_store("run"), new_store("run")
    assert one.find("a") == {}
    other.put(file, "a/1")
    assert one.find("a") == {"a/1": 7}
    other.delete(["a/1"])
    assert one.find("a") == {}


def test_runs_do_not_see_each_other(new_store: Callable[[str], Store], file: Path) -> None:
    new_store("run").put(file, "a/1")
    assert new_store("run-2").find("a") == {}
    new_store("run-2").put(file, "a/2")
    assert new_store("run").find("a") == {"a/1": 7}


def test_deleting_takes_the_named_keys_alone_and_what_is_gone_is_no_error(
    store: Store, file: Path
) -> None:
    for key in ("a/1", "a/2", "a/b/3"):
        store.put(file, key)
    store.delete(["a/1", "a/none", "a/b/3"])
    assert store.find("a") == {"a/2": 7}
    store.delete(["a/1", "a/2"])
    assert store.find("a") == {}
    store.delete([])


def test_reading_what_is_not_there_names_it(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"cannot read .*run/none"):
        store.get("none", tmp_path / "copy", 1)


def test_a_probe_leaves_nothing_behind(store: Store) -> None:
    store.probe()
    store.probe()
    assert store.find("") == {}


@pytest.mark.parametrize("size", [0, 1, (16 << 20) - 1, 16 << 20, (16 << 20) + 1])
def test_a_file_survives(store: Store, tmp_path: Path, size: int) -> None:
    """Sizes around that of the parts in which a large one travels."""
    file = tmp_path / "file.bin"
    file.write_bytes((os.urandom(1 << 16) * 257)[:size])
    store.put(file, "file.bin")
    assert content(store, "file.bin", tmp_path) == file.read_bytes()


def test_parts_stay_in_order_and_few_are_ahead() -> None:
    asked: list[int] = []

    def slow_first(start: int) -> bytes:
        asked.append(start)
        time.sleep(0.1 if start == 0 else 0)
        return bytes([start])

    with ThreadPoolExecutor(8) as pool:
        parts = in_order(pool, slow_first, range(30))
        assert next(parts) == b"\0"
        assert len(asked) <= 8, "memory holds no more"
        assert b"".join(parts) == bytes(range(1, 30))


def test_half_written_files_of_a_folder_are_not_listed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.create("a/whole", b"x")
    (tmp_path / "a" / "half.0123.partial").write_bytes(b"x")
    assert store.find("a") == {"a/whole": 1}


def test_an_emptied_folder_goes_and_one_with_more_in_it_stays(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.create("a/x/1", b"x")
    store.create("a/y/1", b"x")
    store.delete(["a/x/1"])
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["y"]


# Root may write into a folder without permission, but nobody below a file.
@pytest.mark.parametrize("action", ["probe", "put", "create"])
def test_a_folder_that_cannot_be_written_is_named(file: Path, action: str) -> None:
    store = FolderStore(file / "below")
    actions: dict[str, Callable[[], object]] = {
        "probe": store.probe,
        "put": lambda: store.put(file, "key"),
        "create": lambda: store.create("key", b"x"),
    }
    with pytest.raises(StoreUnavailable, match=r"cannot write .*file\.bin/below.*Not a directory"):
        actions[action]()
    assert file.read_bytes() == b"content"


@contextmanager
def as_somebody() -> Iterator[None]:
    """Root may write anywhere; then this is somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o500)
    with as_somebody(), pytest.raises(StoreUnavailable, match="Permission denied"):
        FolderStore(tmp_path / "store").probe()


@pytest.mark.parametrize("action", ["probe", "put", "create"])
def test_a_missing_bucket_is_an_error_and_is_not_created(
    s3_client: Any, s3_endpoint: str, file: Path, action: str
) -> None:
    store = S3Store("s3://not-there/run", endpoint_url=s3_endpoint, region="us-east-1")
    actions: dict[str, Callable[[], object]] = {
        "probe": store.probe,
        "put": lambda: store.put(file, "key"),
        "create": lambda: store.create("key", b"x"),
    }
    with pytest.raises(
        StoreUnavailable, match=r"s3://not-there/run/.*check that the bucket exists"
    ):
        actions[action]()
    names = [bucket["Name"] for bucket in s3_client.list_buckets()["Buckets"]]
    assert "not-there" not in names


@pytest.mark.slow  # the client tries again, with pauses
@pytest.mark.usefixtures("credentials")
def test_a_store_that_does_not_answer_is_unavailable() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        store = S3Store("s3://runs/run", endpoint_url=endpoint, region="us-east-1")
        with pytest.raises(StoreSilent, match=r"cannot write s3://runs/run/\.probe"):
            store.probe()


@pytest.mark.usefixtures("s3_client")
def test_missing_credentials_are_a_store_that_refuses(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    store = S3Store("s3://runs/run", endpoint_url=s3_endpoint, region="us-east-1")
    with pytest.raises(StoreUnavailable, match="redentials"):
        store.probe()


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix/run"),
        ("s3://bucket/", "s3://bucket/run"),
        ("file:///data/runs", "/data/runs/run"),
        ("/data/runs", "/data/runs/run"),
        (None, "/default/run"),
    ],
)
def test_the_uri_of_a_job_chooses_the_store(uri: str | None, expected: str) -> None:
    assert open_store(Checkpoint(uri=uri), "run", Path("/default")).uri == expected


class Overwriting(FolderStore):
    """It takes every write for a new one, as stores do that do not know conditions."""

    def create(self, key: str, content: bytes) -> bool:
        (Path(self.uri) / key).unlink(missing_ok=True)
        return super().create(key, content)


def test_a_store_that_overwrites_is_refused_with_the_reason(tmp_path: Path) -> None:
    store = Overwriting(tmp_path)
    with pytest.raises(StoreUnavailable, match="it ignores If-None-Match"):
        store.probe()
    assert store.find("") == {}


def test_what_is_small_is_read_at_once(store: Store) -> None:
    store.create("a/one", b"content")
    assert store.read("a/one") == b"content"
    with pytest.raises(StoreUnavailable, match=r"cannot read .*a/two"):
        store.read("a/two")


def test_folders_of_a_store_are_stores(store: Store) -> None:
    for key in ("a/x/1", "a/y/z/1", "a/2", "b/1"):
        store.create(key, b"x")
    assert store.folders("") == ["a", "b"]
    assert store.folders("a") == ["x", "y"]
    assert store.folders("none") == []
    assert store.below("a/y").find("") == {"z/1": 1}
    assert store.below("a").uri == f"{store.uri}/a"


class Restarting(FolderStore):
    """Silent for its first few requests, or refusing."""

    def __init__(self, root: Path, *errors: StoreUnavailable) -> None:
        super().__init__(root)
        self.errors = list(errors)

    def create(self, key: str, content: bytes) -> bool:
        if self.errors:
            raise self.errors.pop(0)
        return super().create(key, content)


def test_a_store_that_restarts_is_waited_for(tmp_path: Path) -> None:
    store = Restarting(tmp_path, StoreSilent("no connection"))
    when_it_answers(store.probe, patience_seconds=30)
    assert store.errors == []


def test_a_silence_ends_and_a_refusal_is_told_at_once(tmp_path: Path) -> None:
    silent = Restarting(tmp_path, *[StoreSilent("no connection")] * 9)
    with pytest.raises(StoreSilent):
        when_it_answers(silent.probe, patience_seconds=0.5)
    refusing = Restarting(tmp_path, StoreUnavailable("forbidden"))
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="forbidden"):
        when_it_answers(refusing.probe, patience_seconds=30)
    assert time.monotonic() - started < 0.5


def test_silences_are_waited_out_until_a_moment_and_no_longer(tmp_path: Path) -> None:
    inner = Restarting(tmp_path, StoreSilent("SlowDown"))
    assert Patient(inner, time.monotonic() + 30).create("key", b"x")
    assert not Patient(inner, time.monotonic() + 30).create("key", b"y")
    inner.errors = [StoreSilent("SlowDown")] * 9
    until = time.monotonic() + 0.5
    with pytest.raises(StoreSilent):
        Patient(inner, until).create("other", b"x")
    assert Patient(FolderStore(tmp_path), until).below("").read("key") == b"x"
