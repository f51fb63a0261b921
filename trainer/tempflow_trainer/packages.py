"""Wheels of the user's own code, laid where the ranks import from.

::

    <folder>/
      <sha256>/      a wheel, unpacked: whole or absent

Nothing is built, resolved or run: a wheel of pure Python is an archive of modules and of what the
package says about itself. What cannot be had that way is an image of one's own.
"""

import email
import hashlib
import io
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from tempflow_api.errors import ManifestInvalid, Problem, StoreUnavailable
from tempflow_api.storage import Checkpoint
from tempflow_api.v1alpha1 import Package
from tempflow_trainer.store import open_at
from tempflow_trainer.store_base import when_it_answers

OTHERWISE = "build an image FROM the trainer's instead, see docs/rewards.md"


def unpack(packages: Sequence[Package], settings: Checkpoint, folder: Path) -> list[Path]:
    """What to put on the path of imports, in the order of ``packages``.

    Raises:
        ManifestInvalid: a wheel is not the one that the job names, or not pure Python, or
            requires what is not there.
        StoreUnavailable: it cannot be read, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        places = [
            _unpacked(package, f"spec.packages[{index}]", settings, folder)
            for index, package in enumerate(packages)
        ]
    except OSError as error:
        raise StoreUnavailable(f"cannot unpack wheels in {folder}: {error}") from error
    problems = list(_missing(places))
    if problems:
        raise ManifestInvalid("the job", problems)
    return places


def _unpacked(package: Package, field: str, settings: Checkpoint, folder: Path) -> Path:
    place = folder / package.sha256
    if place.is_dir():
        return place
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        contents = Path(scratch, "contents")
        parent, _, name = package.uri.rpartition("/")
        store = open_at(parent, settings)
        wheel = when_it_answers(lambda: store.read(name))
        digest = hashlib.sha256(wheel).hexdigest()
        if digest != package.sha256:
            raise _refused(f"{field}.sha256", f"{package.uri} has {digest}: it is another wheel")
        try:
            with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
                archive.extractall(contents)
        except zipfile.BadZipFile as error:
            raise _refused(f"{field}.uri", f"{package.uri} is no wheel: {error}") from error
        if not _is_pure(contents):
            told = f"{package.uri} is no wheel of pure Python: {OTHERWISE}"
            raise _refused(f"{field}.uri", told)
        contents.rename(place)
    return place


def _is_pure(contents: Path) -> bool:
    files = contents.glob("*.dist-info/WHEEL")
    told = [email.message_from_string(file.read_text(errors="replace")) for file in files]
    return len(told) == 1 and told[0]["Root-Is-Purelib"] == "true"


def _missing(places: Sequence[Path]) -> Iterator[Problem]:
    """Requirements of the wheels that neither they nor this environment meet."""
    there = {
        canonicalize_name(found.metadata["Name"]): found.version
        for found in metadata.distributions(path=[*sys.path, *reversed([str(p) for p in places])])
        if found.metadata["Name"]  # what is left of an uninstalled package may have none
    }
    for index, place in enumerate(places):
        field = f"spec.packages[{index}]"
        for needed in _requirements(place, field):
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            version = there.get(canonicalize_name(needed.name))
            if version is None or not needed.specifier.contains(version, prereleases=True):
                has = f"has {needed.name} {version}" if version else f"does not have {needed.name}"
                told = f"requires {needed}, and the trainer {has}: name its wheel, too"
                yield Problem(field, f"{told}, or {OTHERWISE}")


def _requirements(place: Path, field: str) -> list[Requirement]:
    (package,) = metadata.distributions(path=[str(place)])
    try:
        return [Requirement(text) for text in package.requires or []]
    except InvalidRequirement as error:
        raise _refused(field, f"has a requirement that cannot be read: {error}") from error


def _refused(field: str, message: str) -> ManifestInvalid:
    return ManifestInvalid("the job", [Problem(field, message)])
