"""A checkpoint is whole or does not exist, and the newest sound one is found."""

import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tempflow import keeping
from tempflow.checkpoints import open_store
from tempflow_api import checkpoint_layout as layout
from tempflow_api.checkpoint_layout import CheckpointManifest
from tempflow_api.errors import CheckpointCorrupt, Fenced, StoreUnavailable
from tempflow_api.retention import Retention
from tempflow_trainer import checkpoint
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.record_copy import RecordCopy
from tempflow_trainer.store import FolderStore
from tempflow_trainer.store_base import Store


def state(epochs: int, size: int = 8) -> State:
    def values(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * epochs + seed)
        return {"a.weight": torch.randn(size, 3, generator=generator)}

    return State(
        epochs_done=epochs,
        updates_done=2 * epochs,
        trained=values(0),
        average=values(1),
        optimizer={f"exp_avg/{name}": value for name, value in values(2).items()},
        totals={"images": 12.0, "seconds.rollout": 0.5},
    )


def export(folder: Path) -> None:
    (folder / layout.CONFIG).write_text("{}")
    (folder / layout.ADAPTER).mkdir()
    (folder / layout.ADAPTER / "weights").write_bytes(b"weights")


def of(
    store: Store, tmp_path: Path, *, attempt: int = 1, keep_last: int = 2, **kept: Any
) -> Checkpoints:
    """One start of a run, which has claimed it."""
    staging = tmp_path / "staging"
    staging.mkdir(exist_ok=True)
    retention = Retention(keep_last, **kept)
    made = Checkpoints(store, staging, attempt, world_size=1, retention=retention)
    made.begin()
    return made


def steps(found: Checkpoints) -> list[int]:
    """Of those that count, newest first."""
    return [folder.step for folder in found.committed()]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """In a folder, where files can be damaged by hand."""
    return of(FolderStore(tmp_path / "store"), tmp_path, keep_last=9)


def assert_equal(one: State, other: State) -> None:
    for part in ("trained", "average", "optimizer"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (one.epochs_done, one.updates_done) == (other.epochs_done, other.updates_done)
    assert one.totals == other.totals


def test_what_is_saved_is_loaded(store: Store, tmp_path: Path) -> None:
    found = of(store, tmp_path)
    folder = found.save(state(3), export)
    assert folder == f"checkpoints/{layout.folder_name(3, 1)}"
    assert found.newest_sound() == folder
    assert_equal(found.load(folder), state(3))
    assert {f"{folder}/{layout.CONFIG}", f"{folder}/adapter/weights"} < set(store.find(folder))
    assert not list((tmp_path / "staging").iterdir())


def test_what_was_read_to_choose_is_not_read_again(tmp_path: Path) -> None:
    """A resume costs one transfer; a second load is a new one."""
    read: list[str] = []

    class Counting(FolderStore):
        def get(self, key: str, file: Path, size: int) -> str:
            read.append(key)
            return super().get(key, file, size)

    run = of(Counting(tmp_path / "store"), tmp_path)
    for step in (1, 2):
        run.save(state(step), export)
    found = run.newest_sound()
    assert found is not None
    once = len(read)
    assert_equal(run.load(found), state(2))
    assert len(read) == once == len(set(read)) > 0
    assert_equal(run.load(found), state(2))
    assert len(read) == 2 * once
    run.newest_sound()
    assert run.load(f"checkpoints/{layout.folder_name(1, 1)}").epochs_done == 1, "not the other one"


def test_a_run_without_checkpoints_has_none(store: Store, tmp_path: Path) -> None:
    assert of(store, tmp_path).newest_sound() is None


def test_each_start_has_folders_of_its_own(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for epochs, attempt in ((9, 1), (10, 1), (10, 2)):
        of(store, tmp_path, attempt=attempt, keep_last=9).save(state(epochs), export)
    last = of(store, tmp_path, attempt=2, keep_last=9)
    for _ in range(2):
        last.save(state(10), export)
    assert [folder.name for folder in last.committed()] == [
        layout.folder_name(10, 2, 2, 2),
        layout.folder_name(10, 2, 2),
        layout.folder_name(10, 2),
        layout.folder_name(10, 1, 2),
        layout.folder_name(9, 1),
    ]


@pytest.mark.parametrize("keep_last", [2, 3])
def test_only_the_last_ones_are_kept(store: Store, tmp_path: Path, keep_last: int) -> None:
    found = of(store, tmp_path, keep_last=keep_last)
    for epochs in range(1, 6):
        found.save(state(epochs), export)
        kept = steps(found)
        assert kept == list(range(epochs, max(0, epochs - keep_last), -1))
    # Nothing of a retired one is left.
    assert {key.split("/")[1] for key in store.find("checkpoints")} == {
        layout.folder_name(step, 1) for step in kept
    }


def test_pinned_regular_and_best_ones_are_kept_too(store: Store, tmp_path: Path) -> None:
    found = of(store, tmp_path, keep_every=5, best_metric="ink", best_count=1)
    for epochs in range(1, 10):
        found.save(state(epochs), export, {"ink": -abs(epochs - 3.0), "reward": float(epochs)})
        if epochs == 2:
            store.create(layout.pin_key(layout.folder_name(1, 1)), b"{}")
    assert steps(found) == [9, 8, 5, 3, 1]
    # A later start knows what was evaluated from the manifests.
    later = of(store, tmp_path, attempt=2, best_metric="ink", best_count=2)
    later.save(state(10), export)
    assert steps(later) == [10, 9, 5, 3, 1]


def test_a_run_goes_on_when_somebody_prunes_beneath_it(tmp_path: Path) -> None:
    """Its next number is taken, by an entry in its own name: it continues from that."""
    found = of(FolderStore(tmp_path / "run"), tmp_path, keep_last=9)
    for epochs in (1, 2, 3, 4):
        found.save(state(epochs), export)
    stored = open_store(str(tmp_path / "run"))
    keeping.prune(stored, keeping.plan(stored, Retention(2)))
    assert steps(found) == [4, 3]
    found.save(state(5), export)
    assert steps(found) == [5, 4, 3]
    later = of(FolderStore(tmp_path / "run"), tmp_path, attempt=2, keep_last=9)
    assert later.parent is not None
    assert steps(later) == [5, 4, 3]


def test_manifests_tell_what_came_before(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    of(store, tmp_path).save(state(1), export)
    second = of(store, tmp_path)
    for epochs in (2, 3):
        second.save(state(epochs), export)
    found = [
        CheckpointManifest.model_validate_json(
            store.read(f"checkpoints/{folder.name}/{layout.MANIFEST}")
        )
        for folder in of(store, tmp_path, keep_last=3).committed()
    ]
    assert [(m.step, m.incarnation, m.parent) for m in found] == [
        (3, 2, layout.folder_name(2, 1, 2)),
        (2, 2, layout.folder_name(1, 1)),
    ]


def test_a_start_that_went_back_goes_on_from_there(tmp_path: Path) -> None:
    """What lay ahead no longer counts, however high its step."""
    store = FolderStore(tmp_path / "store")
    first = of(store, tmp_path, keep_last=9)
    for epochs in (1, 2, 3, 4):
        first.save(state(epochs), export)
    cut(tmp_path / "store/checkpoints" / layout.folder_name(4, 1) / "state/trained.safetensors")
    second = of(store, tmp_path, attempt=2, keep_last=9)
    assert second.parent == layout.folder_name(3, 1)
    assert steps(second) == [3, 2, 1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [cut, flip_a_bit, empty, Path.unlink]
STATE_FILES = [
    f"{layout.STATE}/{name}"
    for name in (checkpoint.TRAINED, checkpoint.AVERAGE, checkpoint.OPTIMIZER, checkpoint.COUNTERS)
]


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut", "bit", "empty", "missing"])
@pytest.mark.parametrize("file", STATE_FILES)
def test_a_damaged_file_makes_the_one_before_the_newest(
    checkpoints: Checkpoints, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    before = checkpoints.save(state(1), export)
    newest = checkpoints.save(state(2), export)
    damage(tmp_path / "store" / newest / file)
    assert checkpoints.newest_sound() == before
    assert_equal(checkpoints.load(before), state(1))
    with pytest.raises(CheckpointCorrupt):
        checkpoints.load(newest)


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut", "bit", "empty", "missing"])
def test_a_damaged_manifest_is_no_checkpoint(
    checkpoints: Checkpoints, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    before = checkpoints.save(state(1), export)
    newest = checkpoints.save(state(2), export)
    manifest = tmp_path / "store" / newest / layout.MANIFEST
    damage(manifest)
    found = checkpoints.newest_sound()
    if damage is flip_a_bit and found == newest:
        # A bit of its time or nonce: the state that it lists is still proven.
        assert_equal(checkpoints.load(newest), state(2))
    else:
        assert found == before


def test_a_start_tells_what_it_skipped_and_of_other_versions(
    checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoints.save(state(1), export)
    newest = checkpoints.save(state(2), export)
    cut(tmp_path / "store" / newest / layout.STATE / checkpoint.TRAINED)
    caplog.set_level(logging.INFO)
    again = of(checkpoints.store, tmp_path)
    assert again.ledger is not None
    assert again.ledger.newest.skipped == [layout.folder_name(2, 1)]
    assert "was written with" not in caplog.text
    older = {**checkpoint.versions(), "torch": "1.0"}
    monkeypatch.setattr(checkpoint, "versions", lambda: older)
    third = of(checkpoints.store, tmp_path)
    assert third.ledger is not None
    assert third.ledger.newest.skipped == []
    assert "and here is {'tempflow': " in caplog.text
    assert "'torch': '1.0'" in caplog.text


def test_when_all_are_damaged_nothing_starts_from_zero(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    for epochs in (1, 2):
        folder = checkpoints.save(state(epochs), export)
        cut(tmp_path / "store" / folder / layout.STATE / checkpoint.TRAINED)
    with pytest.raises(CheckpointCorrupt) as caught:
        checkpoints.newest_sound()
    text = str(caught.value)
    assert text.startswith("none of the newest 2 checkpoints of ")
    assert text.endswith("; move the run's folder aside to start anew")
    for epochs in (1, 2):
        assert layout.folder_name(epochs, 1) in text


def test_folders_of_other_names_and_half_written_ones_are_no_checkpoints(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoints.save(state(1), export)
    root = tmp_path / "store" / "checkpoints"
    (root / "notes").mkdir()
    (root / "notes" / layout.MANIFEST).write_text("{}")
    half = root / layout.folder_name(2, 1) / layout.STATE
    half.mkdir(parents=True)
    (half / checkpoint.TRAINED).write_bytes(b"half")
    assert steps(checkpoints) == [1]
    # The next save of that step keeps clear of what is there.
    assert checkpoints.save(state(2), export).endswith(layout.folder_name(2, 1, save=2))


class Interrupted(FolderStore):
    """A folder that takes so many files and then no more."""

    def __init__(self, root: Path, files: int) -> None:
        super().__init__(root)
        self._left = files

    def put(self, file: Path, key: str) -> None:
        if self._left == 0:
            raise StoreUnavailable(f"cannot write {key}: full")
        self._left -= 1
        super().put(file, key)


@pytest.mark.parametrize("files", range(6))
def test_a_save_that_ends_half_way_leaves_nothing(tmp_path: Path, files: int) -> None:
    root = tmp_path / "store"
    sound = of(FolderStore(root), tmp_path).save(state(1), export)
    before = FolderStore(root).find(layout.CHECKPOINTS)
    with pytest.raises(StoreUnavailable, match="full"):
        of(Interrupted(root, files), tmp_path).save(state(2), export)
    assert FolderStore(root).find(layout.CHECKPOINTS) == before
    found = of(FolderStore(root), tmp_path)
    assert found.newest_sound() == sound
    assert not list((tmp_path / "staging").iterdir())


def test_an_export_that_fails_leaves_nothing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    def failing(_folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreUnavailable, match=r"cannot stage a checkpoint .*No space left"):
        checkpoints.save(state(1), failing)
    assert checkpoints.committed() == []
    assert not list((tmp_path / "staging").iterdir())


class Raced(FolderStore):
    """Another process completes the same folder first."""

    def create(self, key: str, content: bytes) -> bool:
        if key.endswith(layout.MANIFEST):
            other = content.replace(b'"nonce": "', b'"nonce": "other')
            assert super().create(key, other)
        return super().create(key, content)


class LostReply(FolderStore):
    """The manifest is written, its answer is lost, and the request is repeated."""

    def create(self, key: str, content: bytes) -> bool:
        super().create(key, content)
        return super().create(key, content)


def test_a_folder_that_another_process_completed_is_not_taken_for_own(tmp_path: Path) -> None:
    with pytest.raises(Fenced, match="was completed by another process"):
        of(Raced(tmp_path / "store"), tmp_path).save(state(1), export)


def test_a_lost_reply_is_not_taken_for_another_process(tmp_path: Path) -> None:
    found = of(LostReply(tmp_path / "store"), tmp_path)
    assert_equal(found.load(found.save(state(1), export)), state(1))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write more than ``size`` bytes to a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 1000, 9000])
def test_a_full_disk_while_staging_is_an_unavailable_store(
    checkpoints: Checkpoints, tmp_path: Path, limit: int
) -> None:
    """Each of the files of the state is 12 kB."""
    sound = checkpoints.save(state(1), export)
    with largest_file(limit), pytest.raises(StoreUnavailable, match="cannot stage a checkpoint"):
        checkpoints.save(state(2, size=1000), export)
    assert steps(checkpoints) == [1]
    assert checkpoints.newest_sound() == sound
    assert not list((tmp_path / "staging").iterdir())


def test_a_full_disk_of_the_store_leaves_what_was_complete(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    sound = checkpoints.save(state(1), export)
    large = tmp_path / "large"
    large.write_bytes(bytes(20_000))
    with largest_file(9000), pytest.raises(StoreUnavailable, match="File too large"):
        checkpoints.store.put(large, "checkpoints/large")
    with largest_file(0), pytest.raises(StoreUnavailable, match="File too large"):
        checkpoints.store.create("checkpoints/manifest", b"content")
    assert checkpoints.newest_sound() == sound
    assert set(checkpoints.store.find("checkpoints")) == set(checkpoints.store.find(sound))


def test_the_optimizer_goes_on_as_if_never_stopped() -> None:
    def steps(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, seeds: range) -> None:
        for seed in seeds:
            weight.grad = torch.randn(3, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    whole, parts = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    steps(torch.optim.AdamW([whole], lr=0.1), whole, range(6))
    first = torch.optim.AdamW([parts], lr=0.1)
    steps(first, parts, range(3))
    stored = checkpoint.optimizer_tensors(first, ["w"])
    second = torch.optim.AdamW([parts], lr=0.1)
    checkpoint.restore_optimizer(second, ["w"], stored)
    steps(second, parts, range(3, 6))
    assert torch.equal(whole, parts)


def test_a_restored_optimizer_keeps_the_rate_of_the_job() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    first = torch.optim.AdamW([weight], lr=0.1)
    first.step()
    second = torch.optim.AdamW([weight], lr=0.01)
    checkpoint.restore_optimizer(second, ["w"], checkpoint.optimizer_tensors(first, ["w"]))
    assert second.param_groups[0]["lr"] == 0.01


def test_a_store_that_does_not_answer_is_not_a_damaged_checkpoint(tmp_path: Path) -> None:
    class Silent(FolderStore):
        def get(self, key: str, file: Path, size: int) -> str:
            raise StoreUnavailable(f"cannot read {key}: no answer")

    of(FolderStore(tmp_path / "run"), tmp_path).save(state(1), export)
    with pytest.raises(StoreUnavailable, match="no answer"):
        of(Silent(tmp_path / "run"), tmp_path).newest_sound()


def test_a_start_that_was_taken_over_leaves_the_record_alone(tmp_path: Path) -> None:
    """It wakes up between two files, of the same attempt."""
    store = FolderStore(tmp_path / "store")
    files = (layout.EVALUATIONS, layout.METRICS)

    def copied(who: str, asked: Callable[[], None]) -> RecordCopy:
        for file in files:
            (tmp_path / who / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / who / file).write_text(who)
        return RecordCopy(tmp_path / who, store, asked)

    older = of(store, tmp_path)

    def paused_before_the_second() -> None:
        if store.find(layout.RECORD):
            newer = of(store, tmp_path)
            copied("newer", newer.check).send()
        older.check()

    with pytest.raises(Fenced):
        copied("older", paused_before_the_second).send()
    assert [store.read(file) for file in files] == [b"newer", b"newer"]
