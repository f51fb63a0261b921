"""What a reader answers of a store, and when it ends."""

import json
import threading
from pathlib import Path

import pytest

from tempflow_api.errors import ManifestInvalid, StoreUnavailable
from tempflow_trainer.reader import MOST_BYTES, Reader, store_of
from tempflow_trainer.store import FolderStore


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/weights").write_bytes(b"0123456789")
    (tmp_path / "secret").write_text("of another run")
    return Reader(FolderStore(tmp_path / "run"), port=0)


def test_files_and_ranges(reader: Reader) -> None:
    status, body = reader.answer("GET", "/files?below=checkpoints")
    assert (status, json.loads(body)) == (200, {"checkpoints/weights": 10})
    of_weights = "/content?key=checkpoints%2Fweights"
    assert reader.answer("GET", f"{of_weights}&start=2&length=3") == (200, b"234")
    assert reader.answer("GET", f"{of_weights}&start=8&length=9") == (200, b"89")
    assert reader.answer("GET", f"{of_weights}&start=10&length=1") == (200, b"")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/content?key=checkpoints/nothing&start=0&length=1", 404),
        ("/content?key=../secret&start=0&length=1", 400),
        ("/content?key=/etc/passwd&start=0&length=1", 400),
        ("/files?below=checkpoints/../..", 400),
        (f"/content?key=checkpoints/weights&start=0&length={MOST_BYTES + 1}", 400),
        ("/content?key=checkpoints/weights&start=-1&length=1", 400),
        ("/content?key=checkpoints/weights", 400),
        ("/probe", 400),  # it changes the store for a moment: only a POST may
    ],
)
def test_what_is_not_given(reader: Reader, target: str, status: int) -> None:
    found, body = reader.answer("GET", target)
    assert found == status
    assert json.loads(body)["message"]


def test_a_probe_leaves_nothing_and_tells_what_the_store_said(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reader.answer("POST", "/probe") == (200, b"")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]

    def refuses(*_: object) -> bool:
        raise StoreUnavailable("access denied")

    monkeypatch.setattr(FolderStore, "create", refuses)
    status, body = reader.answer("POST", "/probe")
    assert (status, json.loads(body)) == (502, {"message": "access denied"})


def test_it_ends_when_nobody_asks(tmp_path: Path) -> None:
    reader = Reader(FolderStore(tmp_path), port=0, idle_seconds=0.3)
    thread = threading.Thread(target=reader.serve, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("text", "field"),
    [("{}", "uri"), ('{"uri": "s3://bucket", "endpointUrl": "there"}', "endpointUrl")],
)
def test_a_description_that_is_none(text: str, field: str) -> None:
    with pytest.raises(ManifestInvalid, match=f"TEMPFLOW_STORE: {field}"):
        store_of(text)
