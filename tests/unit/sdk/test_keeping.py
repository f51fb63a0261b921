"""Pins and pruning: what is kept, and that a run under way is not disturbed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tempflow import checkpoints, keeping
from tempflow.checkpoints import Store, steps
from tempflow.refused import Refused
from tempflow_api import checkpoint_layout as layout
from tempflow_api.checkpoint_layout import folder_name
from tempflow_api.errors import StoreUnavailable
from tempflow_api.retention import Retention
from tests.builders import make_job
from tests.documents.desk import Desk
from tests.documents.pages import ROOT, commands
from tests.unit.sdk import stored_runs
from tests.unit.sdk.conftest import Put

STEPS = (10, 20, 30, 40, 50)


def entry(number: int, folders: list[str], attempt: int = 1) -> tuple[str, bytes]:
    found = layout.Entry(
        number=number,
        action="commit",
        attempt=attempt,
        incarnation=1,
        nonce="n",
        time="2026-01-31T12:00:00Z",
        committed=folders,
    )
    return layout.entry_key(number), found.model_dump_json(by_alias=True).encode()


@pytest.fixture
def run(stored: tuple[Store, Put]) -> tuple[Store, Put]:
    """Five checkpoints of attempt 1 that count, and what attempt 0 left behind."""
    store, put = stored
    for step in STEPS:
        for path, content in stored_runs.checkpoint(step, 1).items():
            put(path, content)
    put(*entry(7, [folder_name(step, 1) for step in reversed(STEPS)]))
    return store, put


def counting(store: Store) -> list[int]:
    return [step.step for step in steps(store)]


def of(store: Store, number: int) -> checkpoints.Step:
    return checkpoints.choose(store, number)


def test_what_the_rules_do_not_keep_goes_and_what_dead_starts_left(run: tuple[Store, Put]) -> None:
    store, _ = run
    keeping.pin(store, of(store, 10))
    planned = keeping.plan(store, Retention(2, keep_every=30))
    assert [step.step for step in planned.keep] == [10, 30, 40, 50]
    assert [step.step for step in planned.remove] == [20]
    left = [folder_name(step, 0) for step in (10, 20, 30)]
    assert list(planned.left_behind) == left
    assert counting(store) == list(STEPS), "planning changes nothing"
    keeping.prune(store, planned)
    assert counting(store) == [10, 30, 40, 50]
    names = checkpoints.names(store, layout.CHECKPOINTS)
    assert not set(names) & {*left, folder_name(20, 1)}
    newest = checkpoints.newest_entry(store)
    assert newest is not None
    assert (newest.number, newest.action, newest.owner) == (8, "prune", (1, 1))


def test_the_newest_two_are_kept_whatever_is_asked(run: tuple[Store, Put]) -> None:
    store, _ = run
    keeping.prune(store, keeping.plan(store, Retention(0)))
    assert counting(store) == [40, 50]


def test_what_is_pinned_or_committed_meanwhile_is_heeded(run: tuple[Store, Put]) -> None:
    """The run commits, and somebody pins, between the plan and its execution."""
    store, put = run
    planned = keeping.plan(store, Retention(2))
    for path, content in stored_runs.checkpoint(60, 1).items():
        put(path, content)
    put(*entry(8, [folder_name(step, 1) for step in (60, 50, 40, 30, 20, 10)]))
    keeping.pin(store, of(store, 20))
    done = keeping.prune(store, planned)
    assert [step.step for step in done.remove] == [10, 30]
    assert counting(store) == [20, 40, 50, 60]


def test_a_run_that_went_back_meanwhile_keeps_its_newest_two(run: tuple[Store, Put]) -> None:
    store, put = run
    planned = keeping.plan(store, Retention(2))
    put(*entry(8, [folder_name(step, 1) for step in (20, 10)]))
    assert keeping.prune(store, planned).remove == []
    assert counting(store) == [10, 20]


def test_unfinished_work_of_the_owner_is_not_touched(run: tuple[Store, Put]) -> None:
    store, put = run
    for path, content in stored_runs.checkpoint(60, 1, complete=False).items():
        put(path, content)
    keeping.prune(store, keeping.plan(store, Retention(2)))
    assert folder_name(60, 1) in checkpoints.names(store, layout.CHECKPOINTS)


def test_without_a_ledger_every_complete_one_counts(stored: tuple[Store, Put]) -> None:
    store, _ = stored
    planned = keeping.plan(store, Retention(2))
    keeping.prune(store, planned)
    assert [(step.step, step.attempt) for step in steps(store)] == [(20, 0), (20, 1)]
    assert checkpoints.newest_entry(store) is None


def test_pins_are_objects_of_their_own(stored: tuple[Store, Put]) -> None:
    store, _ = stored
    chosen = of(store, 10)
    assert keeping.pin(store, chosen, "figure 3")
    assert not keeping.pin(store, chosen, "again")
    found = json.loads(checkpoints.read(store, layout.pin_key(chosen.folder)) or b"")
    assert found["reason"] == "figure 3"
    assert checkpoints.pinned(store) == {chosen.folder}
    assert keeping.unpin(store, chosen)
    assert not keeping.unpin(store, chosen)
    assert checkpoints.pinned(store) == frozenset()


def test_a_pin_that_came_too_late_says_so(run: tuple[Store, Put]) -> None:
    store, put = run
    chosen = of(store, 10)
    put(*entry(8, [folder_name(50, 1)]))
    with pytest.raises(StoreUnavailable, match="the run has just let go of it"):
        keeping.pin(store, chosen)
    assert checkpoints.pinned(store) == frozenset()


def test_the_rules_are_those_of_the_job(stored: tuple[Store, Put]) -> None:
    store, put = stored
    with pytest.raises(Refused, match=r"run\.json does not say what is to be kept"):
        keeping.retention_of(store, None)
    assert keeping.retention_of(store, 3) == Retention(3)
    spec = make_job().spec_only()
    kept = spec.checkpoint.model_copy(update={"keep_last": 4, "keep_every": 50})
    spec = spec.model_copy(update={"checkpoint": kept})
    put("run.json", spec.model_dump_json(by_alias=True).encode())
    assert keeping.retention_of(store, None) == Retention(4, keep_every=50)
    assert keeping.retention_of(store, 2) == Retention(2, keep_every=50)
    # Changed since: the newest checkpoint has the job as it is.
    newer = spec.model_copy(update={"checkpoint": kept.model_copy(update={"keep_last": 7})})
    newest = f"{layout.CHECKPOINTS}/{steps(store)[-1].folder}/{layout.CONFIG}"
    put(newest, newer.model_dump_json(by_alias=True).encode())
    assert keeping.retention_of(store, None) == Retention(7, keep_every=50)


def test_the_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from tempflow.cli import app

    for path, content in stored_runs.run().items():
        target = tmp_path / "demo" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["checkpoints", *arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert said("pin", "demo", "--step", "10") == f"{folder_name(10, 0)} is pinned\n"
    assert "(pinned)" in said("list", "demo")
    assert json.loads(said("show", "demo", "--step", "10", "-o", "json"))["pinned"] is True
    assert "adapter/pytorch_lora_weights.safetensors" in said("show", "demo")
    assert said("verify", "demo").count(": sound") == 3
    assert said("prune", "demo", "--keep-last", "2").startswith("nothing to prune: 3 checkpoints")
    assert said("unpin", "demo", "--step", "10") == f"{folder_name(10, 0)} is pinned no more\n"
    dry = said("prune", "demo", "--keep-last", "2")
    assert dry.startswith(f"would remove {folder_name(10, 0)}\n2 are kept")
    assert len(json.loads(said("list", "demo", "-o", "json"))) == 3
    assert json.loads(said("prune", "demo", "--keep-last", "2", "--yes", "-o", "json"))["done"]
    assert len(json.loads(said("list", "demo", "-o", "json"))) == 2
    (tmp_path / "demo/checkpoints" / folder_name(20, 0) / "state/empty").write_text("more")
    broken = CliRunner().invoke(app, ["checkpoints", "verify", "demo"])
    assert "state/empty: 4 bytes, expected 0" in broken.stdout
    assert "1 of 2 checkpoints are damaged" in str(broken.exception)


@pytest.mark.slow
def test_the_commands_of_the_page(
    bucket: Any, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Word for word, at a store that the environment names."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    files = stored_runs.run() | {"run.json": make_job().spec_only().model_dump_json().encode()}
    for path, content in files.items():
        bucket.put_object(Key=f"runs/digits/{path}", Body=content)
    typed = [c for c in commands(ROOT / "docs/checkpoints.md") if " s3://bucket/" in c]
    shell = Desk(tmp_path)
    said = {command.split()[2]: shell.run(command) for command in typed}
    assert list(said) == ["list", "show", "verify", "pin", "prune"]
    assert said["verify"].count(": sound") == 3
    assert "pytorch_lora_weights.safetensors" in said["show"]
    assert said["pin"] == f"{folder_name(20, 1)} is pinned\n"
    assert "(pinned)" in shell.run(typed[0])
