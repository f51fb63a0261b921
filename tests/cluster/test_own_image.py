"""The image with a package of one's own that docs/rewards.md shows how to build."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.project_images import BASE_IMAGE, ROOT, ProjectImages
from tests.cluster.target import Target
from tests.wheels import wheel

pytestmark = pytest.mark.cluster

OWN = "localhost/tempflow-own-rewards:test"
SCORE = """
import torch
from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import registry
warmth = registry.build([RewardTerm(name="warmth")]).terms[0].scorer
orange = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
print(float(warmth.score(orange, ["any"], [{}])))
"""


def buildah(*arguments: str) -> str:
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"buildah {' '.join(arguments)}: {done.stderr[-1000:]}"
    return done.stdout


@pytest.fixture
def container(cluster: Target, images: ProjectImages, tmp_path: Path) -> Iterator[str]:
    cluster.our_own("the image that was built here")
    page = (ROOT / "docs/rewards.md").read_text()
    shown = re.search(r"```dockerfile\n(FROM python.+?)```", page, re.S)
    assert shown, "the page shows no Dockerfile"
    ours = shown[1].replace("python:3.11-slim-bookworm", BASE_IMAGE)
    ours = re.sub(r"tempflow-trainer:\S+", images.trainer, ours)
    (tmp_path / "Dockerfile").write_text(ours)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/my_rewards-1.0-py3-none-any.whl").write_bytes(wheel())
    buildah("build", "--isolation", "chroot", "--network", "host", "--tag", OWN, str(tmp_path))
    name = buildah("from", OWN).strip()
    yield name
    buildah("rm", name)
    buildah("rmi", OWN)


def test_the_documented_image_scores_with_its_package(container: str) -> None:
    said = buildah(
        "run", "--isolation", "chroot", container, "--", "/opt/tempflow/bin/python", "-c", SCORE
    )
    assert said.strip() == "0.75"
