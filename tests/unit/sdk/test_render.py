"""What the views say, event by event."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from tempflow.local import Outcome
from tempflow.manifest import parse_text
from tempflow.render import PlainWatcher, ending, live_view, next_command
from tempflow_api.status import Progress
from tests.records import make_evaluation, make_metrics, make_summary
from tests.unit.sdk.manifests import VALID, edited

JOB = parse_text(VALID, "job.yaml").job


def progress(**fields: object) -> Progress:
    known = {"epoch": 2, "epochs": 4, "phase": "rollout", "time": "2026-01-31T12:00:00Z"}
    return Progress.model_validate({**known, **fields})


def text_of(width: int = 120) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width), out


class TestPlain:
    def test_an_epoch_is_one_line_even_where_it_is_longer_than_the_terminal(self) -> None:
        console, out = text_of(width=20)
        watcher = PlainWatcher(console)
        watcher.began(JOB, Path("runs/demo"), [make_metrics(1, -2.0)])
        watcher.trained(make_metrics(2, -1.5), progress(etaSeconds=61.0))
        watcher.trained(make_metrics(3, -1.25), None)
        watcher.evaluated(make_evaluation(4, -1.0))
        watcher.notice("[bold]as it is[/bold]")
        assert out.getvalue().splitlines() == [
            "demo: 4 epochs on cpu, continuing after epoch 1; log in runs/demo/log/trainer.log",
            "epoch 2/4  reward -1.5 ± 0.5  200 images/s  1:01 left",
            "epoch 3/4  reward -1.25 ± 0.5  200 images/s",
            "evaluation after epoch 4: reward -1 (digit-ink -1, diversity 0.25)",
            "[bold]as it is[/bold]",
        ]

    def test_checkpoints_are_told_once_and_not_that_of_an_earlier_start(self) -> None:
        console, out = text_of()
        watcher = PlainWatcher(console)
        for kept in (2, 2, 4, 4):
            watcher.progressed(progress(checkpointEpoch=kept))
        assert out.getvalue() == "checkpoint after epoch 4 is complete\n"


class TestLive:
    def shown(self, now: Progress | None, rewards: list[float]) -> list[str]:
        console, out = text_of()
        console.print(live_view("demo", 4, now, rewards))
        return [line.rstrip() for line in out.getvalue().splitlines()]

    def test_before_anything_is_known(self) -> None:
        lines = self.shown(None, [])
        assert len(lines) == 1
        assert lines[0].startswith("demo")
        assert lines[0].endswith("0/4  starting")

    def test_in_the_middle(self) -> None:
        first, second = self.shown(progress(imagesPerSecond=200.4, etaSeconds=61.0), [-2, -1.5, -1])
        assert first.endswith("2/4  rollout  200 images/s  1:01 left")
        assert second.split() == ["reward", "▁▅█", "-1"]


class TestEnding:
    def outcome(self, code: int, folder: Path, problem: str | None = None) -> Outcome:
        return Outcome(code, folder, None, problem, folder / "log/trainer.log")

    def test_stopped_before_the_first_checkpoint(self, tmp_path: Path) -> None:
        assert ending(self.outcome(130, tmp_path), "tempflow run job.yaml") == [
            "stopped: there is no checkpoint yet; the same command continues: tempflow run job.yaml"
        ]

    def test_done_without_a_summary(self, tmp_path: Path) -> None:
        assert ending(self.outcome(0, tmp_path), "") == [
            f"done; the run left no {tmp_path}/record/summary.json"
        ]

    def test_failed(self, tmp_path: Path) -> None:
        assert ending(self.outcome(83, tmp_path, "it diverged"), "") == [
            "error: it diverged",
            f"log: {tmp_path}/log/trainer.log",
        ]


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [("a three", "'a three'"), ("it's $5", "'it'\"'\"'s $5'")],
)
def test_the_next_command_can_be_pasted(prompt: str, shown: str) -> None:
    job = parse_text(edited(("      - a three", f'      - "{prompt}"')), "job.yaml").job
    assert next_command(job, make_summary("my runs/demo/checkpoints/x"), Path("my runs/demo")) == (
        f"tempflow sample 'my runs/demo' --prompt {shown} --out grid.png"
    )


def test_the_next_command_finds_a_result_that_lies_elsewhere() -> None:
    elsewhere = parse_text(VALID, "job.yaml", ["spec.checkpoint.uri=/data"]).job
    here = make_summary("/data/demo/checkpoints/x")
    assert next_command(elsewhere, here, Path("runs/demo")).startswith(
        "tempflow sample /data/demo/checkpoints/x "
    )
    overrides = ["spec.checkpoint.uri=s3://bucket/a", "spec.checkpoint.endpointUrl=http://s3:9000"]
    remote = parse_text(VALID, "job.yaml", overrides).job
    assert next_command(
        remote, make_summary("s3://bucket/a/demo/checkpoints/x"), Path("runs/demo")
    ) == ("tempflow pull s3://bucket/a/demo --endpoint-url http://s3:9000")
