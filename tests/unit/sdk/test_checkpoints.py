"""Checkpoints listed and pulled, from a folder and from S3 over HTTP."""

import json
from pathlib import Path
from typing import Any

import pytest

from tempflow import checkpoints, pulling
from tempflow.checkpoints import Store, choose, open_store, steps
from tempflow.pulling import pull
from tempflow.refused import Refused
from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import CheckpointCorrupt, StoreUnavailable
from tests.unit.sdk import stored_runs
from tests.unit.sdk.conftest import Put

NEWEST = "checkpoints/step-0000000020-attempt-000001"


def test_complete_steps_are_listed_oldest_first(stored: tuple[Store, Put]) -> None:
    found = steps(stored[0])
    assert [(step.step, step.attempt) for step in found] == [(10, 0), (20, 0), (20, 1)]
    assert {step.result for step in found} == {"adapter"}
    assert {step.size for step in found} == {7000 + 3500}


def test_what_another_writer_adds_is_seen_at_once(stored: tuple[Store, Put]) -> None:
    store, put = stored
    steps(store)
    for path, content in stored_runs.checkpoint(40).items():
        put(path, content)
    assert steps(store)[-1].step == 40


def test_a_checkpoint_without_manifest_does_not_exist(stored: tuple[Store, Put]) -> None:
    store, put = stored
    put(f"{NEWEST}/MANIFEST.json", None)
    assert [(step.step, step.attempt) for step in steps(store)] == [(10, 0), (20, 0)]


def entry(number: int, *steps: int) -> tuple[str, bytes]:
    """An entry of the ledger, in which these checkpoints of attempt 0 count."""
    found = layout.Entry(
        number=number,
        action="commit",
        attempt=0,
        incarnation=1,
        nonce="n",
        time="2026-01-31T12:00:00Z",
        committed=[layout.folder_name(step, 0) for step in steps],
    )
    return layout.entry_key(number), found.model_dump_json(by_alias=True).encode()


def test_the_highest_entry_of_the_ledger_says_what_counts(
    stored: tuple[Store, Put], tmp_path: Path
) -> None:
    """What an older start left behind, complete as it may be, is neither listed nor pulled."""
    store, put = stored
    put(*entry(9, 20, 10))
    put(*entry(10, 30, 10))
    assert [(step.step, step.attempt) for step in steps(store)] == [(10, 0)]
    with pytest.raises(Refused, match=r"no complete checkpoint of step 20"):
        choose(store, 20)
    pull(store, choose(store, None), tmp_path / "here")
    assert json.loads((tmp_path / "here/MANIFEST.json").read_text())["step"] == 10


def test_an_entry_that_cannot_be_understood_is_not_guessed_around(
    stored: tuple[Store, Put],
) -> None:
    store, put = stored
    put(layout.entry_key(3), b"{}")
    with pytest.raises(CheckpointCorrupt, match=r"ledger/0000000003\.json is damaged"):
        steps(store)


def test_pull_takes_the_newest_whole(stored: tuple[Store, Put], tmp_path: Path) -> None:
    store, _ = stored
    seen: list[tuple[int, int]] = []
    chosen = choose(store, None)
    assert (chosen.step, chosen.attempt) == (20, 1)
    pull(store, chosen, tmp_path / "here", lambda done, total: seen.append((done, total)))
    for path, content in stored_runs.CONTENT.items():
        assert (tmp_path / "here" / path).read_bytes() == content
    assert json.loads((tmp_path / "here/MANIFEST.json").read_text())["step"] == 20
    assert seen[-1] == (10500, 10500)
    assert seen == sorted(seen)


def test_a_step_can_be_chosen(stored: tuple[Store, Put]) -> None:
    store, _ = stored
    assert choose(store, 10).step == 10
    with pytest.raises(
        Refused, match=r"^no complete checkpoint of step 30 at .*: there are 10, 20"
    ):
        choose(store, 30)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"weightz" * 1000, "is damaged: its size or SHA-256 is not the one in MANIFEST.json"),
        (b"weights", "is damaged: its size or SHA-256 is not the one in MANIFEST.json"),
        (None, "is missing: choose another --step"),
    ],
    ids=["flipped", "truncated", "deleted"],
)
def test_damage_leaves_nothing_here(
    stored: tuple[Store, Put], tmp_path: Path, content: bytes | None, message: str
) -> None:
    store, put = stored
    put(f"{NEWEST}/adapter/pytorch_lora_weights.safetensors", content)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointCorrupt, match=message):
        pull(store, choose(store, None), tmp_path / "out/here")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_manifest_that_is_no_manifest(stored: tuple[Store, Put], tmp_path: Path) -> None:
    store, put = stored
    put(f"{NEWEST}/MANIFEST.json", b'{"format": 1}')
    assert steps(store)[-1].manifest is None
    with pytest.raises(CheckpointCorrupt, match=r"MANIFEST\.json cannot be understood"):
        pull(store, choose(store, None), tmp_path / "here")


def test_a_manifest_cannot_reach_outside(stored: tuple[Store, Put], tmp_path: Path) -> None:
    store, put = stored
    manifest = json.loads(stored_runs.checkpoint(20, 1)[f"{NEWEST}/MANIFEST.json"])
    manifest["files"][0]["path"] = "a/../../outside"
    put(f"{NEWEST}/MANIFEST.json", json.dumps(manifest).encode())
    with pytest.raises(CheckpointCorrupt, match="cannot be understood"):
        pull(store, choose(store, None), tmp_path / "here")


def test_a_folder_that_exists_is_not_touched(stored: tuple[Store, Put], tmp_path: Path) -> None:
    store, _ = stored
    (tmp_path / "here").mkdir()
    with pytest.raises(Refused, match="exists: choose another folder with --to"):
        pull(store, choose(store, None), tmp_path / "here")


def test_a_folder_that_cannot_be_written(stored: tuple[Store, Put], tmp_path: Path) -> None:
    store, _ = stored
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"^cannot write .*: not a directory$"):
        pull(store, choose(store, None), tmp_path / "file/here")


def test_no_run(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "nothing"))
    assert steps(store) == []
    with pytest.raises(StoreUnavailable, match=r"^no complete checkpoint at .*/nothing: expects"):
        choose(store, None)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}", "{}/checkpoints", "{}/checkpoints/"])
def test_a_folder_can_be_given_in_several_ways(form: str, tmp_path: Path) -> None:
    assert open_store(form.format(tmp_path)).root == str(tmp_path)


def test_an_address_of_another_kind() -> None:
    with pytest.raises(Refused, match=r"^got gs://b/p: expects a folder, file:///folder or s3://"):
        open_store("gs://b/p")


def test_the_folder_to_pull_to_is_named_after_the_run(stored: tuple[Store, Put]) -> None:
    target = pulling.default_target(stored[0], choose(stored[0], 10))
    assert str(target) == "demo-step-10"


class TestS3:
    def test_a_missing_bucket_is_named_and_not_made(self, s3_endpoint: str, bucket: Any) -> None:
        store = open_store("s3://no-such-bucket/demo", s3_endpoint)
        with pytest.raises(StoreUnavailable, match=r"no-such-bucket/demo: .* does not exist$"):
            choose(store, None)
        client = bucket.meta.client
        assert "no-such-bucket" not in [b["Name"] for b in client.list_buckets()["Buckets"]]

    @pytest.mark.usefixtures("bucket")
    def test_a_store_that_is_not_there(self) -> None:
        store = open_store("s3://bucket/demo", "http://127.0.0.1:9")
        with pytest.raises(StoreUnavailable, match=r"^cannot read s3://bucket/demo: Could not"):
            steps(store)

    def test_without_credentials(
        self, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        store = open_store("s3://bucket/demo", s3_endpoint)
        with pytest.raises(StoreUnavailable, match="credentials"):
            steps(store)


class TestFind:
    """What the status of a job names is the folder of one checkpoint."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> str:
        for path, content in stored_runs.run().items():
            target = tmp_path / "demo" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return str(tmp_path / "demo")

    def test_by_run_and_by_folder(self, run: str) -> None:
        newest = checkpoints.find(run, None)[1]
        oldest = steps(open_store(run))[0]
        folder = f"{run}/checkpoints/{oldest.folder}"
        assert oldest.step < newest.step
        assert checkpoints.find(f"{folder}/", None)[1] == oldest
        assert checkpoints.find(folder, oldest.step)[1] == oldest

    def test_a_folder_that_is_not_complete(self, run: str) -> None:
        with pytest.raises(StoreUnavailable, match="no complete checkpoint at"):
            checkpoints.find(f"{run}/checkpoints/step-0000000099-attempt-000001", None)

    def test_a_folder_and_another_step(self, run: str) -> None:
        with pytest.raises(Refused, match="is the checkpoint of step 20: leave out --step"):
            checkpoints.find(f"{run}/{NEWEST}", 3)
