"""Reading what a run writes while it is written."""

from pathlib import Path

from tempflow.record import Record
from tests.records import make_metrics

ONE = make_metrics(1, -1.5).model_dump_json(by_alias=True).encode() + b"\n"
TWO = ONE.replace(b'{"epoch":1', b'{"aNewKey":1,"epoch":2')


def metrics(run: Path) -> Path:
    (run / "record").mkdir(exist_ok=True)
    return run / "record/metrics.jsonl"


def test_nothing_yet(tmp_path: Path) -> None:
    record = Record(tmp_path)
    assert (list(record.epochs()), list(record.evaluations())) == ([], [])
    assert (record.progress(), record.summary()) == (None, None)


def test_each_line_comes_once_and_whole(tmp_path: Path) -> None:
    path, record = metrics(tmp_path), Record(tmp_path)
    path.write_bytes(ONE + TWO[:10])
    assert [m.epoch for m in record.epochs()] == [1]
    assert [m.epoch for m in record.epochs()] == []
    path.write_bytes(ONE + TWO)
    assert [m.epoch for m in record.epochs()] == [2]


def test_a_file_that_was_cut_is_read_anew(tmp_path: Path) -> None:
    path, record = metrics(tmp_path), Record(tmp_path)
    path.write_bytes(ONE + TWO)
    assert len(list(record.epochs())) == 2
    path.write_bytes(ONE)
    assert [m.epoch for m in record.epochs()] == [1]


def test_what_cannot_be_understood_is_skipped(tmp_path: Path) -> None:
    path, record = metrics(tmp_path), Record(tmp_path)
    path.write_bytes(b"\x00\x01\n{}\n" + ONE)
    assert [m.epoch for m in record.epochs()] == [1]
    (tmp_path / "record/progress.json").write_text("{")
    assert record.progress() is None
