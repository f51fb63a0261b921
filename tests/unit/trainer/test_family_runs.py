"""A whole job of every family: it trains, stops, goes on, and leaves what diffusers loads."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from tempflow_api import checkpoint_layout as layout
from tempflow_api import naming
from tempflow_api.errors import Preempted
from tempflow_trainer.log_tail import LogTail
from tempflow_trainer.main import train
from tempflow_trainer.models.tuning import LORA_FILE
from tests.unit.trainer.family_cases import (
    ALONE,
    FLUX,
    KLEIN,
    QWEN,
    SD3,
    Case,
    plain_pipeline,
    starts,
)
from tests.unit.trainer.sessions import epochs, final_state, never, rows

EPOCHS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapter_of(folder: Path) -> Path:
    """The newest checkpoint's."""
    return max((folder / layout.CHECKPOINTS).iterdir()) / layout.ADAPTER


@pytest.mark.parametrize("case", [SD3, FLUX, QWEN, KLEIN], ids=str)
def test_a_job_that_was_stopped_ends_as_the_whole_one(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = case.job(tmp_path / "models", EPOCHS)

    def attempt(folder: Path, stop_requested: Callable[[], bool]) -> None:
        monkeypatch.setenv(naming.ENV_WORK_DIR, str(folder))
        train(job, ALONE, stop_requested, LogTail(0, 0))

    whole, parts = tmp_path / "whole" / "demo", tmp_path / "parts" / "demo"
    attempt(whole, never)
    asked = count()
    with pytest.raises(Preempted, match=f"stopped after 1 of {EPOCHS} epochs"):
        attempt(parts, lambda: parts_done(parts) and next(asked) > 0)
    attempt(parts, never)
    assert epochs(parts, layout.METRICS) == [1, 2, 3]
    for name in (layout.METRICS, layout.EVALUATIONS):
        assert rows(parts, name) == rows(whole, name)
    one, other = final_state(whole), final_state(parts)
    for part in ("trained", "average", "optimizer"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), part
    ended, continued = adapter_of(whole) / LORA_FILE, adapter_of(parts) / LORA_FILE
    assert ended.read_bytes() == continued.read_bytes()

    pipeline = plain_pipeline(case, tmp_path / "models")
    size = case.size()
    x = starts(case.load(tmp_path / "models"), *size)
    before = case.its_images(pipeline, x, *size)
    pipeline.load_lora_weights(continued.parent)
    assert not torch.equal(case.its_images(pipeline, x, *size), before)


def parts_done(folder: Path) -> bool:
    """Whether an epoch is in the record."""
    record = folder / layout.METRICS
    return record.is_file() and bool(record.read_text())
