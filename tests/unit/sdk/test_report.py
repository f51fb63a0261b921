"""The report page: complete, self-contained, and safe whatever a run has written."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tempflow import report
from tempflow.checkpoints import open_store
from tempflow.cli import app
from tempflow.refused import Refused
from tempflow.report.charts import Line, chart, ticks
from tempflow.report.gather import GRIDS_SHOWN, selection
from tempflow_api import checkpoint_layout as layout
from tempflow_api.record import Metrics
from tests.builders import make_job
from tests.records import (
    TIME,
    make_evaluation,
    make_metrics,
    make_save,
    make_self_test,
    make_summary,
)

PNG = b"\x89PNG not a real picture"


def a_run(folder: Path, *, epochs: int = 4, name: str = "demo", grid: str | None = None) -> Path:
    """A run's folder with a record of ``epochs`` epochs, evaluated after each."""
    run = folder / name
    (run / "record/grids").mkdir(parents=True)
    metrics = [make_metrics(n, -2.0 + n / 10) for n in range(1, epochs + 1)]
    evaluations = []
    for n in range(epochs + 1):
        path = grid or f"record/grids/epoch-{n:06d}.png"
        evaluations.append(make_evaluation(n, -2.0 + n / 10).model_copy(update={"grid": path}))
        (run / f"record/grids/epoch-{n:06d}.png").write_bytes(PNG)
    for file, lines in (("metrics", metrics), ("evaluations", evaluations)):
        text = "".join(line.model_dump_json(by_alias=True) + "\n" for line in lines)
        (run / f"record/{file}.jsonl").write_text(text, encoding="utf-8")
    spec = make_job().spec_only()
    (run / "run.json").write_text(spec.model_dump_json(by_alias=True), encoding="utf-8")
    summary = make_summary(str(run)).model_dump_json(by_alias=True)
    (run / "record/summary.json").write_text(summary, encoding="utf-8")
    return run


def with_trouble(run: Path) -> Path:
    """What a run tells of itself that was interrupted, alarmed, and lacked scores."""
    text = (run / layout.METRICS).read_text(encoding="utf-8")
    lines = [Metrics.model_validate_json(line) for line in text.splitlines()]
    lines[2] = lines[2].model_copy(
        update={
            "alarms": ["reward fell <b>"],
            "rollbacks": 1,
            "missing_scores": {"judge": 7},
            "groups_left_out": 2,
        }
    )
    saves = [make_save(2), make_save(4, "cannot write: SlowDown")]
    for path, told in ((layout.METRICS, lines), (layout.SAVES, saves)):
        text = "".join(line.model_dump_json(by_alias=True) + "\n" for line in told)
        (run / path).write_text(text, encoding="utf-8")
    (run / layout.SELF_TEST).write_text(make_self_test().model_dump_json(by_alias=True))
    (run / layout.LEDGER).mkdir()
    for number, (action, attempt) in enumerate(
        [("claim", 0), ("commit", 0), ("claim", 1), ("claim", 2)], start=1
    ):
        entry = {"number": number, "action": action, "attempt": attempt, "incarnation": 1}
        entry |= {"nonce": "n", "time": TIME, "skipped": ["step-9"] if attempt == 2 else []}
        found = layout.Entry.model_validate(entry)
        (run / layout.entry_key(number)).write_text(found.model_dump_json(by_alias=True))
    (run / layout.LOGS).mkdir()
    for rank in (0, 1):
        (run / layout.log_key(1, rank)).write_text(f"=== started ===\nrank {rank} <i>said</i>\n")
    return run


class References(HTMLParser):
    """What a page would fetch or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]


def test_page_holds_curves_pictures_and_configuration_and_fetches_nothing(tmp_path: Path) -> None:
    html = report.page(report.gather(open_store(str(a_run(tmp_path)))))
    references = References(html)
    assert references.tags.count("img") == 5
    assert all(reference.startswith("data:image/png;base64,") for reference in references.found)
    assert "script" not in references.tags
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    assert "url(" not in html
    assert "promptsPerEpoch" in html
    assert "-2 → -1.6" in html


def test_every_epoch_is_a_point_of_the_reward_curve(tmp_path: Path) -> None:
    html = report.page(report.gather(open_store(str(a_run(tmp_path, epochs=7)))))
    for epoch in range(1, 8):
        assert f"<title>while training, epoch {epoch}: " in html
    assert "0 in every epoch: kl" in html


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    run = a_run(tmp_path, name="a<script>alert(1)<")
    html = report.page(report.gather(open_store(str(run))))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_what_went_wrong_is_told(tmp_path: Path) -> None:
    html = report.page(report.gather(open_store(str(with_trouble(a_run(tmp_path))))))
    for told in (
        "<td>3</td><td>training</td><td>reward fell &lt;b&gt;</td>",
        "of the guard; rollbacks: 1",
        "<td>judge</td><td>7 of 864</td><td>1</td>",
        "2 groups of draws lack a required score",
        f"<td>1</td><td>1</td><td>{TIME}</td><td>nothing: from the beginning</td>",
        "1 saves stored, 1 failed; training waited 1 s in all. One takes 2 s beside it for 1.0 MiB",
        "<td>4</td>",
        "cannot write: SlowDown",
        "<td>trained parameters</td><td>123,456</td>",
        "<summary>attempt-000001-rank-00001</summary><pre>=== started ===\nrank 1 &lt;i&gt;said",
    ):
        assert told in html, told
    assert "beginning, as step-9 is damaged</td>" in html
    assert html.count("from the beginning") == 3, "a row a claim, none a commit"


def test_a_run_without_trouble_has_no_word_of_it(tmp_path: Path) -> None:
    html = report.page(report.gather(open_store(str(a_run(tmp_path)))))
    for title in ("Alarms", "Missing scores", "Starts", "Self-test", "Last lines"):
        assert f"<h2>{title}" not in html


@pytest.mark.parametrize("path", ["../../secret.png", "/etc/hostname", "record/grids/../../x"])
def test_a_grid_outside_the_run_is_not_read(tmp_path: Path, path: str) -> None:
    assert report.gather(open_store(str(a_run(tmp_path, grid=path)))).grids == []


def test_a_run_under_way_and_a_half_written_line(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    (run / "record/summary.json").unlink()
    with (run / "record/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"epoch": 5, "rew')
    record = report.gather(open_store(str(run)))
    assert len(record.metrics) == 4
    assert "peak memory" not in report.page(record)


def test_no_run_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no record of a run at .*record/metrics.jsonl"):
        report.gather(open_store(str(tmp_path)))


def test_verb_refuses_to_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    assert runner.invoke(app, ["report", str(run)]).exit_code == 0
    page = tmp_path / "demo-report.html"
    page.write_text("mine", encoding="utf-8")
    again = runner.invoke(app, ["report", str(run)])
    assert isinstance(again.exception, Refused)
    assert page.read_text(encoding="utf-8") == "mine"
    assert runner.invoke(app, ["report", str(run), "--force"]).exit_code == 0
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@given(st.integers(1, 60))
def test_selection_keeps_first_and_last(count: int) -> None:
    items = [make_evaluation(n, 0.0) for n in range(count)]
    chosen = [one.epoch for one in selection(items, GRIDS_SHOWN)]
    assert len(chosen) == min(count, GRIDS_SHOWN)
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, count - 1)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    slack = 1e-6 * (abs(low) + span)
    assert len(found) <= 12
    assert all(low - slack <= tick <= high + slack for tick in found)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=20))
def test_chart_draws_whatever_is_finite(values: list[float]) -> None:
    svg = chart("any", [Line("curve", list(enumerate(values)))])
    finite = sum(value - value == 0 for value in values)
    assert svg.count("<circle") == finite
    assert not re.search(r"\b(nan|inf)\b", svg)
