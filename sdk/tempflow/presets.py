"""Manifests to start from, one for each model and task that the papers report."""

from dataclasses import dataclass
from importlib import resources

from tempflow.complaints import nearest
from tempflow.refused import Refused


@dataclass(frozen=True)
class Preset:
    """A manifest with comments, to be copied and edited."""

    name: str
    text: str

    @property
    def summary(self) -> str:
        """What it trains: the first line of its header."""
        return self.text.splitlines()[0].removeprefix("# ")

    @property
    def hardware(self) -> str:
        """What it wants to run on, from its header."""
        return self._said("Hardware: ").partition(". ")[0]

    @property
    def missing(self) -> str:
        """What this version lacks to run it, from its header; empty if nothing."""
        return self._said("Missing: ").partition(";")[0]

    def _said(self, keyword: str) -> str:
        header = self.text.split("apiVersion:")[0].replace("\n# ", " ")
        return header.partition(keyword)[2]


def all_presets() -> list[Preset]:
    """Every preset; the one that runs anywhere stands first."""
    folder = resources.files("tempflow") / "presets"
    found = [
        Preset(entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8"))
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    ]
    return sorted(found, key=lambda preset: (preset.name != "digits", preset.name))


def preset(name: str) -> Preset:
    """The preset of that name, or Refused with the nearest one."""
    by_name = {preset.name: preset for preset in all_presets()}
    if name in by_name:
        return by_name[name]
    hint = nearest(name, list(by_name)) or f": expects {', '.join(by_name)}"
    raise Refused(f"no preset '{name}'{hint}")


def listing() -> list[str]:
    """All presets: name, what it trains, what it wants to run on."""
    lines = []
    for one in all_presets():
        lines += [one.name, f"    {one.summary}", f"    Wants {one.hardware}."]
        lines += [f"    Cannot run: {one.missing}."] if one.missing else []
    return lines
