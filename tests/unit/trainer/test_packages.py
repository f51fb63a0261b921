"""Wheels in the store that ranks import from; and what is said of those that cannot be had."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tempflow_api.errors import ManifestInvalid, StoreUnavailable
from tempflow_api.storage import Checkpoint
from tempflow_api.v1alpha1 import Package
from tempflow_trainer import packages
from tests.unit.trainer.conftest import BUCKET
from tests.wheels import sha256, wheel


@pytest.fixture
def settings(s3_endpoint: str) -> Checkpoint:
    return Checkpoint(endpoint_url=s3_endpoint, region="us-east-1")


@pytest.fixture
def stored(s3_client: Any) -> Any:
    """Puts a wheel into the store, and gives the job's word for it."""

    def store(content: bytes, digest: str | None = None) -> Package:
        name = f"wheels/{sha256(content)}/own-1.0-py3-none-any.whl"
        s3_client.put_object(Bucket=BUCKET, Key=name, Body=content)
        return Package(uri=f"s3://{BUCKET}/{name}", sha256=digest or sha256(content))

    return store


def test_a_process_imports_from_it_and_finds_its_entry_points(
    stored: Any, settings: Checkpoint, tmp_path: Path
) -> None:
    needed = wheel(name="their-colours")
    wheels = [
        stored(wheel("their-colours>=1", "torch", 'tomli; python_version < "3"')),
        stored(needed),
    ]
    places = packages.unpack(wheels, settings, tmp_path)
    look = (
        "from importlib.metadata import entry_points; import my_rewards, their_colours;"
        "print([p.value for p in entry_points(group='tempflow.rewards') if p.name == 'warmth'])"
    )
    path = os.pathsep.join(map(str, places))
    told = subprocess.run(
        [sys.executable, "-c", look], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert told.stdout.strip() == "['my_rewards:Warmth', 'their_colours:Warmth']", told.stderr


def test_what_is_there_is_not_fetched_again(
    stored: Any, s3_client: Any, settings: Checkpoint, tmp_path: Path
) -> None:
    package = stored(wheel())
    first = packages.unpack([package], settings, tmp_path)
    s3_client.delete_object(Bucket=BUCKET, Key=package.uri.removeprefix(f"s3://{BUCKET}/"))
    assert packages.unpack([package], settings, tmp_path) == first
    with pytest.raises(StoreUnavailable, match=r"cannot read s3://runs/wheels/.*whl"):
        packages.unpack([package], settings, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("content", "digest", "message"),
    [
        (wheel(), "0" * 64, rf"spec\.packages\[0\]\.sha256: \S+ has {sha256(wheel())}: it is anot"),
        (b"no archive", None, r"spec\.packages\[0\]\.uri: \S+ is no wheel: "),
        (wheel(pure=False), None, r"uri: \S+ is no wheel of pure Python: build an image FROM"),
        (
            wheel("no-such-package>=2"),
            None,
            r"packages\[0\]: requires no-such-package>=2, and the trainer does not have no-such-",
        ),
        (wheel("two words"), None, r"packages\[0\]: has a requirement that cannot be read: "),
        (wheel("numpy<1"), None, r"requires numpy<1, and the trainer has numpy \d.*FROM"),
    ],
    ids=["another wheel", "no wheel", "compiled", "a requirement", "no requirement", "an old one"],
)
def test_a_wheel_that_will_not_do_is_refused_and_not_kept(
    content: bytes,
    digest: str | None,
    message: str,
    stored: Any,
    settings: Checkpoint,
    tmp_path: Path,
) -> None:
    for _ in range(2):  # a second start says the same
        with pytest.raises(ManifestInvalid, match=message):
            packages.unpack([stored(content, digest)], settings, tmp_path)


def test_a_folder_that_cannot_be_written_is_named(
    stored: Any, settings: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"cannot unpack wheels in .*file/below: "):
        packages.unpack([stored(wheel())], settings, tmp_path / "file/below")
