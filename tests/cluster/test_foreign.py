"""What the tests do to a cluster that is not ours before they touch it."""

from pathlib import Path

import pytest

from tests.cluster import foreign
from tests.cluster.kubectl import Kubectl
from tests.cluster.project_images import ProjectImages
from tests.cluster.s3 import S3, Keys


def kubectl(folder: Path, script: str) -> Kubectl:
    program = folder / "kubectl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return Kubectl(program, folder / "kubeconfig")


def test_a_cluster_that_has_the_project_is_refused(tmp_path: Path) -> None:
    has_namespace = kubectl(tmp_path, 'case "$2" in namespace/*) echo tempflow-system;; esac')
    with pytest.raises(pytest.exit.Exception, match="has namespace/tempflow-system, which"):
        foreign.refuse_installed(has_namespace)


def test_a_cluster_without_it_is_taken(tmp_path: Path) -> None:
    foreign.refuse_installed(kubectl(tmp_path, ":"))


def test_an_image_alone_leaves_out_and_names_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, trainer = foreign.IMAGE_VARIABLES
    monkeypatch.setenv(operator, "registry:5000/operator:1")
    monkeypatch.delenv(trainer, raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"set {trainer}$"):
        foreign.images()


@pytest.mark.parametrize(
    ("image", "repository", "version"),
    [
        ("registry:5000/operator:1", "registry:5000/operator", "image.tag=1"),
        ("registry/operator@sha256:ab", "registry/operator", "image.digest=sha256:ab"),
    ],
)
def test_an_image_goes_to_the_chart_in_parts(image: str, repository: str, version: str) -> None:
    values = ProjectImages(image, "trainer:1").chart_values()
    assert {f"image.repository={repository}", version, "trainerImage=trainer:1"} <= set(values)


def test_keys_are_not_shown_when_a_test_fails() -> None:
    assert "hidden" not in repr(S3("http://s3", "bucket", Keys("hidden", "hidden")))
