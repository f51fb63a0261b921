"""One whole copy of a model a node, whoever else downloads it and whatever cuts it off."""

import hashlib
import multiprocessing
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tempflow_api.errors import ModelUnavailable
from tempflow_trainer.models import download
from tempflow_trainer.models.download import fetch
from tests.unit.trainer.conftest import BUCKET

FILES = {"model_index.json": b"{}", "transformer/weights.bin": bytes(range(256)) * 30}

FOLDER = download.folder_of("bucket/model")


class Shop:
    """The calls of an fsspec filesystem that a download makes, counted."""

    def __init__(self, files: dict[str, bytes] = FILES, *, breaks_after: int | None = None) -> None:
        self.files = {f"bucket/model/{name}": content for name, content in files.items()}
        self.left = breaks_after
        self.bytes = 0

    def find(self, prefix: str, *, detail: bool) -> dict[str, dict[str, Any]]:
        assert detail
        return {
            key: {"size": len(content), "ETag": f'"{hashlib.md5(content).hexdigest()}"'}
            for key, content in self.files.items()
            if key.startswith(prefix)
        }

    def call_s3(self, what: str, *, Bucket: str, Key: str, PartNumber: int) -> dict[str, Any]:
        assert (what, PartNumber) == ("head_object", 1)
        return {"ContentLength": len(self.files[f"{Bucket}/{Key}"])}

    def cat_file(self, key: str, *, start: int, end: int) -> bytes:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError("connection reset")
        self.bytes += end - start
        return self.files[key][start:end]


def copy(shop: Shop, cache: Path) -> Path:
    return fetch(shop, "s3://bucket/model", "bucket/model", cache)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_CHUNK", 1000)


def test_a_copy_is_whole_and_made_once(tmp_path: Path) -> None:
    shop = Shop()
    assert contents(copy(shop, tmp_path)) == FILES
    before = shop.bytes
    assert contents(copy(shop, tmp_path)) == FILES
    assert shop.bytes == before == sum(map(len, FILES.values()))


@pytest.mark.parametrize("calls", range(9))
def test_a_copy_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, calls: int) -> None:
    first, second = Shop(breaks_after=calls), Shop()
    with pytest.raises(OSError, match="reset"):
        copy(first, tmp_path)
    assert contents(copy(second, tmp_path)) == FILES
    assert first.bytes + second.bytes == sum(map(len, FILES.values()))


def test_a_damaged_copy_is_not_kept(tmp_path: Path) -> None:
    partial = tmp_path / f"{FOLDER}.partial/transformer"
    partial.mkdir(parents=True)
    tag = hashlib.md5(FILES["transformer/weights.bin"]).hexdigest()
    (partial / f"weights.bin.{tag}.arriving").write_bytes(b"x" * 500)
    with pytest.raises(ModelUnavailable, match=r"weights\.bin has digest .* try again"):
        copy(Shop(), tmp_path)
    assert contents(copy(Shop(), tmp_path)) == FILES


def test_an_object_that_was_replaced_between_two_tries_begins_anew(tmp_path: Path) -> None:
    old = {**FILES, "transformer/weights.bin": bytes(7680)}
    with pytest.raises(OSError, match="reset"):
        copy(Shop(old, breaks_after=4), tmp_path)
    assert (
        contents(copy(Shop(), tmp_path))["transformer/weights.bin"]
        == FILES["transformer/weights.bin"]
    )


def test_two_prefixes_never_share_a_folder() -> None:
    assert download.folder_of("bucket/x/y") != download.folder_of("bucket/x--y")


@pytest.mark.parametrize("first", [5 << 20, (5 << 20) + 77_000])
def test_an_object_that_was_uploaded_in_parts_is_checked_too(
    *,
    s3_client: Any,
    s3_endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: int,
) -> None:
    """As a real server tags it, also where the last part is the longer one."""
    monkeypatch.setattr(download, "_CHUNK", 1 << 20)
    content = bytes(range(256)) * 44_000
    place = {"Bucket": BUCKET, "Key": "big/weights.bin"}
    upload = {**place, "UploadId": s3_client.create_multipart_upload(**place)["UploadId"]}
    tags = [
        s3_client.upload_part(**upload, PartNumber=number, Body=body)["ETag"]
        for number, body in enumerate((content[:first], content[first:]), 1)
    ]
    found = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
    s3_client.complete_multipart_upload(**upload, MultipartUpload={"Parts": found})
    source, prefix = f"s3://{BUCKET}/big", f"{BUCKET}/big"
    filesystem, _ = fsspec.url_to_fs(source, endpoint_url=s3_endpoint, skip_instance_cache=True)
    listed = filesystem.find(prefix, detail=True)
    (tag,) = [about["ETag"].strip('"') for about in listed.values()]
    assert tag.endswith("-2")
    assert contents(fetch(filesystem, source, prefix, tmp_path)) == {"weights.bin": content}
    damaged = tmp_path / "again" / f"{download.folder_of(prefix)}.partial"
    damaged.mkdir(parents=True)
    (damaged / f"weights.bin.{tag}.arriving").write_bytes(b"x" * 500)
    with pytest.raises(ModelUnavailable, match=r"weights\.bin has digest .*-2, the store says"):
        fetch(filesystem, source, prefix, tmp_path / "again")


def test_an_empty_prefix_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="nothing at s3://bucket/model"):
        copy(Shop({}), tmp_path)


def _count(cache: Path, counts: Any) -> None:
    shop = Shop()
    copy(shop, cache)
    counts.put(shop.bytes)


def test_processes_that_start_together_download_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    processes = [context.Process(target=_count, args=(tmp_path, counts)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    total = sum(counts.get(timeout=10) for _ in processes)
    assert total == sum(map(len, FILES.values()))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [FOLDER]
