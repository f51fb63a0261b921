"""The whole way as its two people go it: the administrator's helm, and a user's commands.

The user types no kubectl, and has nothing but the chart's edit role in one namespace; what needs
its role for reading inside comes last, after that was bound.
"""

import hashlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from tempflow_api import naming
from tempflow_api.errors import ExitCode
from tests.cluster import scenario
from tests.cluster.kubectl import Kubectl
from tests.cluster.project_images import ProjectImages
from tests.cluster.s3 import S3
from tests.cluster.scenario import DEFINITION, SECRET, SYSTEM, Release
from tests.cluster.target import Target
from tests.cluster.waiting import Say, wait_for
from tests.drawn_digits import share_found

pytestmark = pytest.mark.cluster

# Enough that the operator can be upgraded and rolled back meanwhile, which takes 15 s.
EPOCHS = 40
# One of them follows the whole job, two minutes; what takes longer hangs.
COMMAND_SECONDS = 330


@dataclass(frozen=True)
class Laptop:
    """A folder in which one user types commands."""

    folder: Path
    user: Kubectl
    s3: S3
    namespace: str
    has_credentials: bool = True
    """Of the store; without them only the cluster gets at it."""

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "tempflow", *arguments],
            cwd=self.folder,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _environment(self) -> dict[str, str]:
        found = self.user.environment()
        if self.has_credentials:
            return {**found, **scenario.access(self.s3)}
        for name in scenario.credentials(self.s3):
            found.pop(name, None)
        nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        return {**found, **nowhere}

    def __call__(self, *arguments: str) -> str:
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += f"\nnot done after {COMMAND_SECONDS} s\n"
        assert process.returncode == 0, f"{' '.join(arguments)}: {process.returncode}: {err}{out}"
        return out


@pytest.fixture
def team(cluster: Target) -> Iterator[str]:
    name = f"journey-{uuid.uuid4().hex[:8]}"
    cluster.kubectl.run("create", "namespace", name)
    yield name
    cluster.kubectl.run("delete", "namespace", name, "--timeout=2m")


def test_from_helm_install_to_helm_uninstall(
    cluster: Target, images: ProjectImages, team: str, s3: S3, tmp_path: Path, say: Say
) -> None:
    release = Release(cluster)
    release.install(images)
    say("installed")
    try:
        assert len(release.pods()) == 2
        user = scenario.create_user(cluster.kubectl, team, s3, tmp_path)
        research(Laptop(tmp_path, user, s3, team), release, images, say)
        release.save_logs(cluster.logs)
        release.uninstall_chart()
        wait_for("all but the definition gone", lambda: not left_over(cluster), deadline_seconds=60)
        cluster.kubectl.run("get", DEFINITION)  # is kept, and with it every job
    finally:
        release.uninstall()
    wait_for("the namespace gone", lambda: gone(cluster, SYSTEM), deadline_seconds=90)
    wait_for("nothing left", lambda: not left_over(cluster), deadline_seconds=30)


def upgraded_and_rolled_back(release: Release, images: ProjectImages) -> None:
    """What the administrator does meanwhile."""
    release.install(images, "--set", "log.level=DEBUG")
    assert (release.revision(), release.log_level()) == (2, "DEBUG")
    release.roll_back()
    assert (release.revision(), release.log_level()) == (3, "INFO")


def leading(release: Release) -> str:
    """The leader's pod, once one of this revision leads: a replaced one gives the Lease up."""

    def there() -> bool:
        alive = [pod for pod in release.pods() if "deletionTimestamp" not in pod["metadata"]]
        return release.leader() in [pod["metadata"]["name"] for pod in alive]

    wait_for("a leader of this revision", there, deadline_seconds=60)
    return release.leader()


def research(tempflow: Laptop, release: Release, images: ProjectImages, say: Say) -> None:
    """What the user does."""
    in_team = ("-n", tempflow.namespace)
    store = ("--set", f"spec.checkpoint.endpointUrl={tempflow.s3.endpoint}")
    examined = json.loads(tempflow("doctor", "-o", "json", *in_team))
    states = {finding["check"]: finding["state"] for finding in examined}
    assert "fault" not in states.values()
    assert {states[check] for check in ("api server", "resource definition", "rights")} == {"ok"}
    tempflow("init", "--preset", "digits", "--out", "job.yaml")
    shorten(tempflow.folder / "job.yaml", tempflow.s3)
    told = tempflow("submit", "job.yaml", *in_team, *store)
    assert told == f"{tempflow.namespace}/digits: submitted; next: tempflow status digits\n"
    say("submitted")
    watching = tempflow.start("status", "digits", "--watch", *in_team)
    tempflow("wait", "digits", "--for", "Running", "--timeout", "2m", *in_team)
    say("running")
    upgraded_and_rolled_back(release, images)  # touches no job: it ends in its first attempt
    lost = leading(release)
    assert training(tempflow)
    release.kill(lost)  # and this neither
    assert training(tempflow)
    ended = "killed" if release.cluster.own is not None else "deleted"
    say(f"upgraded and rolled back, and the leader {ended}")
    followed = tempflow("logs", "digits", "--follow", *in_team)
    tempflow("wait", "digits", "--timeout", "5m", *in_team)
    say("finished")
    assert release.leader() not in ("", lost)
    # What was read while it was written is what there is to read.
    kept = tempflow("logs", "digits", *in_team)
    assert sorted(followed.splitlines()) == sorted(kept.splitlines())
    # With several pods each line says whose it is; one that has nothing to say is not there.
    assert "[1/0]" in {line.split()[0] for line in followed.splitlines()} <= {"[1/0]", "[1/1]"}
    watched, _ = watching.communicate(timeout=30)
    assert (
        json.loads(tempflow("status", "digits", "-o", "json", *in_team))["status"]["attempt"] == 1
    )
    assert watched.splitlines()[-1].startswith(f"digits: Succeeded, epoch {EPOCHS}/"), watched
    (row,) = tempflow("list", *in_team).splitlines()[1:]
    assert row.split()[:4] == ["digits", "Succeeded", "2", f"{EPOCHS}/{EPOCHS}"]
    assert "AttemptStarted" in tempflow("events", "digits", *in_team)
    assert "Completed" in tempflow("describe", "digits", *in_team)
    listed = tempflow("checkpoints", "list", "job/digits", *in_team)
    assert str(EPOCHS) in {line.split()[0] for line in listed.splitlines()[1:]}
    tempflow("pull", "job/digits", "--to", "result", *in_team)
    tempflow("sample", "result", "--prompt", "a three", "--count", "16", "--out", "three.png")
    assert share_found(tempflow.folder / "three.png", "a three", 16) > 0.5
    read_inside(release.cluster.kubectl, tempflow.namespace)
    inside = probed(tempflow, store, images)
    assert (inside["objects"], inside["storage inside"]) == ("unknown", "ok"), inside
    pulled_from_inside(tempflow)
    tempflow("report", "job/digits", "--out", "digits.html", *in_team)
    assert "digit-ink" in (tempflow.folder / "digits.html").read_text()
    say("pulled, drawn and told")
    everything = told_anywhere(release, tempflow.namespace)
    assert SECRET in everything  # by its name
    for value in scenario.credentials(tempflow.s3).values():
        assert value not in everything
    assert tempflow("delete", "digits", "--timeout", "2m", *in_team) == "digits: deleted\n"
    assert tempflow("list", "-o", "name", *in_team) == ""


def training(tempflow: Laptop) -> bool:
    """Whether the pods run and epochs are left."""
    job = f"{naming.LABEL_JOB_NAME}=digits"
    pods = tempflow.user.items("pods", "-l", job, namespace=tempflow.namespace)
    told = json.loads(tempflow("status", "digits", "-o", "json", "-n", tempflow.namespace))
    status = told["status"]
    phases = {status["phase"], *(pod["status"]["phase"] for pod in pods)}
    running = len(pods) == 2 and phases == {"Running"}
    return running and status.get("progress", {}).get("epoch", 0) < EPOCHS


def read_inside(admin: Kubectl, namespace: str) -> None:
    """Let the user start pods that read the store."""
    admin.run(
        *("create", "rolebinding", "reads-inside", "-n", namespace),
        *("--clusterrole=tempflow-via-cluster", f"--serviceaccount={namespace}:researcher"),
    )


def told_anywhere(release: Release, namespace: str) -> str:
    """All objects of both namespaces but the Secrets, and what the pods there have written."""
    admin = release.cluster.kubectl
    listed = admin.run("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    kinds = ",".join(kind for kind in listed if kind != "secrets")
    told = []
    for place in (namespace, SYSTEM):
        told.append(admin.run("get", kinds, "-n", place, "-o", "yaml"))
        for pod in admin.items("pods", namespace=place):
            name = pod["metadata"]["name"]
            told.append(admin.run("logs", name, "-n", place, "--all-containers"))
    return "\n".join(told)


def probed(tempflow: Laptop, store: tuple[str, ...], images: ProjectImages) -> dict[str, str]:
    """What the doctor says of the manifest; whether the Secret is there, this user may not see."""
    whole = tempflow("validate", "job.yaml", "-o", "yaml", *store)
    (tempflow.folder / "whole.yaml").write_text(whole)
    probe = ("--probe", "--image", images.trainer, "-n", tempflow.namespace)
    examined = json.loads(tempflow("doctor", "whole.yaml", "-o", "json", *probe))
    return {finding["check"]: finding["state"] for finding in examined}


def pulled_from_inside(tempflow: Laptop) -> None:
    """The same, from where the store cannot be read; and no pod of it is left."""
    outside = replace(tempflow, has_credentials=False)
    asked = ("job/digits", "--to", "inside", "-n", tempflow.namespace)
    refused = outside.start("pull", *asked)
    _, said = refused.communicate(timeout=120)
    assert refused.returncode == ExitCode.STORE, said
    outside("pull", *asked, "--via-cluster")
    assert digests(tempflow.folder / "inside") == digests(tempflow.folder / "result")
    role = f"{naming.LABEL_ROLE}={naming.ROLE_READER}"
    wait_for(
        "the reader gone",
        lambda: not tempflow.user.items("pods", "-l", role, namespace=tempflow.namespace),
        deadline_seconds=30,
    )


def digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def shorten(file: Path, s3: S3) -> None:
    """An editor's work: few epochs on two nodes, and the prompts in a file of their own."""
    raw = yaml.safe_load(file.read_text())
    spec = raw["spec"]
    (file.parent / "prompts.txt").write_text("\n".join(spec["data"].pop("prompts")) + "\n")
    spec["data"]["promptsFile"] = "prompts.txt"
    spec["algorithm"].update(epochs=EPOCHS, seedsPerPrompt=1)
    spec["evaluation"] = {"everyEpochs": 100, "steps": 4, "prompts": 2, "imagesPerPrompt": 2}
    spec["checkpoint"] = {"uri": s3.uri("journey"), "everyEpochs": 3}
    spec["compute"].update(nodes=2, processesPerNode=1, secretName=SECRET)
    file.write_text(yaml.safe_dump(raw))


def left_over(cluster: Target) -> list[str]:
    """Objects of the chart and of its jobs, whatever their kind."""
    roles = "roles,rolebindings,clusterroles,clusterrolebindings"
    policies = "leases,poddisruptionbudgets,networkpolicies"
    found = cluster.kubectl.items(
        f"all,configmaps,secrets,serviceaccounts,{roles},{policies}",
        *("-A", "-l", "app.kubernetes.io/name=tempflow"),
    )
    return [f"{one['kind']}/{one['metadata']['name']}" for one in found]


def gone(cluster: Target, namespace: str) -> bool:
    selected = f"--field-selector=metadata.name={namespace}"
    return not cluster.kubectl.items("namespaces", selected)
