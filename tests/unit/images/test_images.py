"""The image scripts with a stand-in for the container tool, and what has to hold between files."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tools" / "images.sh"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


class Machine:
    """A PATH on which only the given container tools are; each records its calls."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.record = folder / "record"
        for name in ("sh", "dirname", "sed", "git", "awk", "id"):
            (self.bin / name).symlink_to(self._found(name))

    @staticmethod
    def _found(name: str) -> str:
        return subprocess.run(
            ["/bin/sh", "-c", f"command -v {name}"], capture_output=True, text=True, check=True
        ).stdout.strip()

    def install(self, tool: str, *, works: bool = True) -> None:
        path = self.bin / tool
        body = f'echo "{tool} $*" >>"{self.record}"; echo 123 MB' if works else "exit 1"
        path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        path.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": str(self.bin), **environment},
        )

    def calls(self, action: str) -> list[str]:
        lines = self.record.read_text(encoding="utf-8").splitlines() if self.record.exists() else []
        return [line for line in lines if line.split()[1] == action]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("tool", ["docker", "podman", "buildah"])
def test_builds_with_the_tool_that_is_there(machine: Machine, tool: str) -> None:
    machine.install(tool)
    done = machine.run("build", IMAGE_TAG="v1")
    assert done.returncode == 0, done.stderr
    operator, trainer = machine.calls("build")
    assert operator.startswith(tool)
    assert "--target operator --tag localhost/tempflow-operator:v1" in operator
    assert "--target trainer --tag localhost/tempflow-trainer:v1" in trainer
    assert "localhost/tempflow-operator:v1:" in done.stdout


def test_an_image_of_a_reward_has_the_lock_of_that_reward(machine: Machine) -> None:
    machine.install("buildah")
    machine.run("build", "hpsv3", "operator", IMAGE_TAG="v1")
    reward, operator = machine.calls("build")
    assert "--target reward --tag localhost/tempflow-hpsv3:v1" in reward
    assert "--build-arg REWARD=hpsv3" in reward
    assert "REWARD" not in operator


def test_docker_without_its_daemon_is_passed_over(machine: Machine) -> None:
    machine.install("docker", works=False)
    machine.install("buildah")
    assert machine.run("build", "operator").returncode == 0
    assert len(machine.calls("build")) == 1


def test_without_any_tool_it_says_which_would_do(machine: Machine) -> None:
    done = machine.run("build")
    assert done.returncode != 0
    assert "docker (with its daemon), podman or buildah" in done.stderr


def test_options_reach_the_build(machine: Machine) -> None:
    machine.install("buildah")
    machine.run(
        *("build", "operator"),
        IMAGE_REPOSITORY="registry/project",
        BASE_IMAGE="my-base:1",
        CA_BUNDLE="/certificates/bundle with space.pem",
        BUILD_FLAGS="--isolation chroot --network host",
    )
    (call,) = machine.calls("build")
    assert "--build-arg BASE_IMAGE=my-base:1" in call
    assert "--secret id=ca_bundle,src=/certificates/bundle with space.pem" in call
    assert "--isolation chroot --network host" in call
    assert re.search(r"--tag registry/project/tempflow-operator:\d+\.\d+\.\d+", call)


def test_pushes_what_it_would_build(machine: Machine) -> None:
    machine.install("podman")
    machine.run("push", "trainer", IMAGE_REPOSITORY="registry/project", IMAGE_TAG="v1")
    assert machine.calls("push") == ["podman push registry/project/tempflow-trainer:v1"]


@pytest.mark.parametrize("arguments", [(), ("build", "everything"), ("destroy", "operator")])
def test_what_it_does_not_know_is_refused(machine: Machine, arguments: tuple[str, ...]) -> None:
    machine.install("buildah")
    done = machine.run(*arguments)
    assert done.returncode == 2
    assert "tools/images.sh build" in done.stderr


@pytest.mark.parametrize(
    "script", sorted((ROOT / "tools").glob("*.sh")), ids=lambda path: path.name
)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["/bin/sh", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK) or script.name == "container_tool.sh"


def _locked(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==([^ ;\\]+)", text, flags=re.MULTILINE))


@pytest.mark.parametrize("target", ["operator", "trainer"])
def test_the_images_hold_the_versions_that_were_tested(target: str) -> None:
    everything, ours = _locked("requirements.lock"), _locked(f"requirements-{target}.lock")
    assert len(ours) > 30
    assert ours.items() <= everything.items()


LOCKS = [*ROOT.glob("requirements*.lock"), *(ROOT / "tools/reward_images").glob("*.lock")]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_its_hash(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)


def test_what_the_operator_needs_is_no_torch() -> None:
    assert not {"torch", "triton", "diffusers", "transformers"} & set(
        _locked("requirements-operator.lock")
    )


@pytest.mark.parametrize("target", ["operator", "trainer", "reward"])
def test_the_image_runs_as_an_ordinary_user_without_a_shell(target: str) -> None:
    (stage,) = re.findall(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.M | re.S)
    assert "USER 65532:65532" in stage
    assert re.search(r'^ENTRYPOINT \["/opt/tempflow/bin/python", "-m", ', stage, re.M)
    assert stage.index("USER") > stage.index("COPY")


def test_code_lies_above_the_dependencies() -> None:
    for target in ("operator", "trainer", "reward"):
        dependencies = DOCKERFILE.index(f"AS {target}-dependencies")
        assert dependencies < DOCKERFILE.index(f"FROM {target}-dependencies AS {target}")
    assert DOCKERFILE.count("COPY --from=code") == 3


def test_what_the_dockerfile_copies_is_not_ignored() -> None:
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)
        for source in line.split()[:-1]
    }
    assert copied == allowed


def test_files_name_no_registry() -> None:
    for path in (ROOT / "Dockerfile", *sorted((ROOT / "tools").glob("*.sh"))):
        assert not re.search(r"\b[a-z0-9-]+\.(io|com|org)/", path.read_text(encoding="utf-8")), path
