"""What pages tell to install is typed into an environment of its own.

It sees the packages that the trainer's lock names, where they are already, and nothing else: what
our own packages lack, pip would fetch, and the test would see it arrive.
"""

import os
import re
import shutil
import sysconfig
import venv
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from tests.documents.desk import Desk
from tests.documents.pages import ROOT, commands

pytestmark = pytest.mark.slow

OURS = {"tempflow", "tempflow_api", "tempflow_operator", "tempflow_trainer"}
# What `pip install .` reads of a clone.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "sdk", "operator", "trainer")
# Python's own command for pip, which `make setup` installs.
PIP = '#!/bin/sh\nexec "$(dirname "$0")/python" -m pip "$@"\n'


@dataclass
class Reader:
    """Somebody with a clone, an environment, and an empty folder of packages in it."""

    desk: Desk
    packages: Path

    def arrived(self) -> set[str]:
        """What was installed: names of packages and modules, without versions."""
        found = {entry.name.partition("-")[0].removesuffix(".py") for entry in self.there()}
        return found - {"__pycache__"}

    def there(self) -> list[Path]:
        return [path for path in self.packages.iterdir() if path.suffix != ".pth"]


def locked() -> list[str]:
    """The packages that the extra `trainer` brings on this machine."""
    lines = (ROOT / "requirements-trainer.lock").read_text().splitlines()
    found = [Requirement(line.rstrip(" \\")) for line in lines if re.match(r"\w", line)]
    return [one.name for one in found if one.marker is None or one.marker.evaluate()]


def show(packages: list[str], folder: Path) -> None:
    """Links to installed packages, as a folder that Python finds them in."""
    folder.mkdir()
    for name in packages:
        installed = distribution(name)
        tops = {file.parts[0] for file in installed.files or ()}
        for top in tops - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(installed.locate_file(top))))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    clone, own = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("own") / "environment"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            litter = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, clone / name, ignore=litter)
        else:
            shutil.copy(ROOT / name, clone)
    venv.create(own, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(own)}))
    show([*locked(), "pip"], own / "seen")
    (packages / "seen.pth").write_text(str(own / "seen"))
    (own / "bin/pip").write_text(PIP)
    (own / "bin/pip").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PATH": f"{own / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return Reader(Desk(clone, environment), packages)


@pytest.fixture(scope="module")
def told(reader: Reader) -> str:
    """What the installation of the page on runs said."""
    assert reader.arrived() == set()
    [command] = [c for c in commands(ROOT / "docs/run.md") if c.startswith("pip ")]
    return reader.desk.run(command)


def test_the_trainer_is_installed_by_one_command(reader: Reader, told: str) -> None:
    assert reader.arrived() == OURS, told
    reader.desk.run("pip check")
    assert reader.desk.run("tempflow version").split()[0] == "tempflow"
    print_files = "; ".join(f"import {name}; print({name}.__file__)" for name in sorted(OURS))
    files = reader.desk.run(f"python -c '{print_files}'").split()
    assert {Path(file).parent for file in files} == {reader.packages / name for name in OURS}
    reader.desk.run("tempflow init --preset digits")
    assert (reader.desk.folder / "digits.yaml").exists()


def test_a_package_of_ones_own_is_installed_beside_it(reader: Reader, told: str) -> None:
    """With the commands of the page on rewards, up to the wheel's digest."""
    assert told
    page = (ROOT / "docs/rewards.md").read_text()
    source = reader.desk.folder / "my-rewards"
    source.mkdir()
    for name, kind in (("pyproject.toml", "toml"), ("my_rewards.py", "python")):
        shown = re.search(rf"`{name}`:\n\n```{kind}\n(.+?)```", page, re.S)
        assert shown, f"the page shows no {name}"
        (source / name).write_text(shown[1])
    Image.new("RGB", (6, 4), (255, 0, 51)).save(reader.desk.folder / "photo.png")
    typed = commands(ROOT / "docs/rewards.md")
    said = {c: reader.desk.run(c) for c in typed[typed.index("pip install ./my-rewards") :]}
    assert [line.split()[0] for line in said] == ["pip", "tempflow", "pip", "sha256sum"]
    assert reader.arrived() == OURS | {"my_rewards"}
    [scored] = [text for command, text in said.items() if command.startswith("tempflow ")]
    assert float(scored.split()[0]) == pytest.approx(2 * (1 - 0.2), abs=1e-3)
