"""A transfer that breaks off goes on; a result alone lies as diffusers wants it; digests decide."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tempflow import pulling
from tempflow.checkpoints import Store, choose, open_store, steps
from tempflow.pulling import pull, verify
from tempflow.refused import Refused
from tempflow_api.errors import CheckpointCorrupt, StoreUnavailable
from tests.unit.sdk import stored_runs
from tests.unit.sdk.conftest import Put, store_in

NEWEST = "checkpoints/step-0000000020-attempt-000001"
RANGES = 7 + 4
"""Of 1000 bytes: of the adapter and of the optimizer."""


@pytest.fixture(params=["folder", "s3", "reader"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Put]:
    return store_in(request.param, request, tmp_path)


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "RANGE_BYTES", 1000)


def test_a_broken_transfer_goes_on_where_it_was(
    stored: tuple[Store, Put], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = stored
    monkeypatch.setattr(pulling, "RANGES_AT_ONCE", 1)
    target = tmp_path / "out/here"
    with monkeypatch.context() as broken:
        broken.setattr(pulling, "_read_range", after_ranges(5))
        with pytest.raises(StoreUnavailable, match="connection lost"):
            pull(store, choose(store, None), target)
    assert not target.exists()
    seen: list[int] = []
    asked: list[int] = []
    real = pulling._read_range

    def counting(store: Store, path: str, start: int, length: int) -> bytes:
        asked.append(start)
        return real(store, path, start, length)

    monkeypatch.setattr(pulling, "_read_range", counting)
    pull(store, choose(store, None), target, lambda done, _total: seen.append(done))
    assert len(asked) == RANGES - 5
    assert seen[-1] == 10_500
    assert min(seen) > 0
    for path, content in stored_runs.CONTENT.items():
        assert (target / path).read_bytes() == content
    assert [entry.name for entry in target.parent.iterdir()] == ["here"]
    assert not [p for p in target.rglob("*") if p.suffix in (".part", ".ranges", ".save")]


def after_ranges(count: int) -> Callable[[Store, str, int, int], bytes]:
    real, left = pulling._read_range, iter(range(count))

    def read(store: Store, path: str, start: int, length: int) -> bytes:
        if next(left, None) is None:
            raise StoreUnavailable("cannot read: connection lost")
        return real(store, path, start, length)

    return read


def test_what_is_left_of_another_save_is_not_gone_on_with(
    stored: tuple[Store, Put], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, put = stored
    with monkeypatch.context() as broken:
        broken.setattr(pulling, "_read_range", after_ranges(9))
        with pytest.raises(StoreUnavailable):
            pull(store, choose(store, None), tmp_path / "here")
    content = b"WEIGHTS" * 1000
    manifest = json.loads(stored_runs.checkpoint(20, 1)[f"{NEWEST}/MANIFEST.json"])
    manifest["nonce"] = "another"
    manifest["files"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    put(f"{NEWEST}/{manifest['files'][0]['path']}", content)
    put(f"{NEWEST}/MANIFEST.json", json.dumps(manifest).encode())
    pull(store, choose(store, None), tmp_path / "here")
    assert (tmp_path / "here" / manifest["files"][0]["path"]).read_bytes() == content


def test_a_result_alone_is_the_folder_that_diffusers_loads(
    stored: tuple[Store, Put], tmp_path: Path
) -> None:
    store, _ = stored
    pull(store, choose(store, None), tmp_path / "here", form="lora")
    found = [entry.name for entry in (tmp_path / "here").iterdir()]
    assert found == ["pytorch_lora_weights.safetensors"]
    with pytest.raises(Refused, match=r"holds no transformer/: .* choose --format lora"):
        pull(store, choose(store, None), tmp_path / "there", form="full")
    assert not (tmp_path / "there").exists()


def test_verify_names_every_damage_and_writes_nothing(stored: tuple[Store, Put]) -> None:
    store, put = stored
    weights = "adapter/pytorch_lora_weights.safetensors"
    put(f"{NEWEST}/{weights}", b"weightz" * 1000)
    put(f"{NEWEST}/state/empty", None)
    put("checkpoints/step-0000000010-attempt-000000/state/optimizer.safetensors", b"short")
    seen: list[tuple[int, int]] = []
    assert verify(store, steps(store), lambda done, total: seen.append((done, total))) == {
        "step-0000000010-attempt-000000": ["state/optimizer.safetensors: 5 bytes, expected 3500"],
        "step-0000000020-attempt-000000": [],
        "step-0000000020-attempt-000001": [f"{weights}: another SHA-256", "state/empty: missing"],
    }
    assert seen[-1] == (3 * 10_500 - 3500, 3 * 10_500)


@pytest.mark.usefixtures("bucket")
class TestProfile:
    def test_a_profile_is_used_and_an_unknown_one_is_named(
        self, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        file = tmp_path / "credentials"
        file.write_text("[research]\naws_access_key_id = a\naws_secret_access_key = b\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        assert steps(open_store("s3://bucket/empty", s3_endpoint, profile="research")) == []
        with pytest.raises(StoreUnavailable, match="nobody"):
            steps(open_store("s3://bucket/empty", s3_endpoint, profile="nobody"))


def test_damage_found_at_the_end_is_not_gone_on_with(
    stored: tuple[Store, Put], tmp_path: Path
) -> None:
    store, put = stored
    path = f"{NEWEST}/adapter/pytorch_lora_weights.safetensors"
    put(path, b"weightz" * 1000)
    with pytest.raises(CheckpointCorrupt):
        pull(store, choose(store, None), tmp_path / "here")
    put(path, stored_runs.CONTENT["adapter/pytorch_lora_weights.safetensors"])
    pull(store, choose(store, None), tmp_path / "here")
