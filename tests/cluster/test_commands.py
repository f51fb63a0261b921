"""The cluster verbs of the command line against a real API server: output, codes, errors."""

import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from tempflow import Client
from tempflow.cli import main
from tempflow.cluster.connection import JOBS
from tempflow_api import naming
from tempflow_api.conditions import ConditionType
from tempflow_api.errors import ExitCode
from tests.cluster.apiserver import ApiServer, free_port
from tests.cluster.client_objects import (
    FAILED,
    SUCCEEDED,
    WHEN,
    add_node,
    add_pod,
    condition,
    digits,
    end_pod,
    here,
    set_status,
    status,
)
from tests.cluster.kubelet import Kubelet

pytestmark = pytest.mark.cluster

EXAMPLE = str(here("examples/digits.yaml"))
STORE = ("--set", "spec.checkpoint.uri=s3://bucket/runs")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Shell = Callable[..., Done]


@pytest.fixture
def client(api: ApiServer) -> Iterator[Client]:
    with Client(kubeconfig=str(api.kubeconfig("admin"))) as client:
        yield client


@pytest.fixture
def shell(
    api: ApiServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Shell:
    """``tempflow`` in this process and an empty folder, on the test's own API server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig("admin")))

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["tempflow", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        captured = capfd.readouterr()
        return Done(int(exited.value.code or 0), captured.out, captured.err)

    return run


class TestSubmit:
    def test_says_what_to_do_next(self, shell: Shell) -> None:
        done = shell("submit", EXAMPLE, *STORE, "--set", "metadata.name=next")
        assert (done.code, done.err) == (0, "")
        assert done.out == "default/next: submitted; next: tempflow status next\n"

    def test_from_stdin_as_an_object(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        with Path(EXAMPLE).open() as source:
            monkeypatch.setattr(sys, "stdin", source)
            done = shell("submit", "-f", "-", *STORE, "--set", "metadata.name=piped", "-o", "yaml")
        assert yaml.safe_load(done.out)["metadata"]["name"] == "piped"

    def test_nothing_is_sent_when_one_of_several_is_wrong(self, shell: Shell) -> None:
        Path("bad.yaml").write_text("kind: Pod\n")
        done = shell("submit", EXAMPLE, "bad.yaml", *STORE, "--set", "metadata.name=many")
        assert done.code == ExitCode.INVALID
        assert shell("status", "many").code == ExitCode.NOT_FOUND

    def test_those_before_one_that_is_refused_are_told(self, shell: Shell, client: Client) -> None:
        client.submit(digits("b-taken"))
        for name in ("a-free", "b-taken"):
            text = Path(EXAMPLE).read_text().replace("name: digits", f"name: {name}", 1)
            Path(f"{name}.yaml").write_text(text)
        done = shell("submit", "a-free.yaml", "b-taken.yaml", *STORE)
        assert done.code == ExitCode.CONFLICT
        assert done.out == "default/a-free: submitted; next: tempflow status a-free\n"
        assert "job default/b-taken exists already" in done.err

    def test_a_local_store_is_refused_at_its_line(self, shell: Shell) -> None:
        done = shell("submit", EXAMPLE, "--set", "spec.checkpoint.uri=runs")
        assert done.code == ExitCode.INVALID
        assert "spec.checkpoint.uri: got runs: expects s3://bucket/prefix" in done.err

    @pytest.mark.parametrize(
        ("content", "name", "told"),
        [
            (b"x" * 900_001, "p.txt", "900,000 can be taken along: copy it to the store"),
            (b"\xff", "p.txt", "is not text in UTF-8"),
            (b"a three", "p.csv", "expects a name that ends in .txt or .jsonl"),
            (None, "p.txt", "no such file or directory: write the prompts there"),
        ],
    )
    def test_prompts_that_cannot_go_along(
        self, shell: Shell, content: bytes | None, name: str, told: str
    ) -> None:
        if content is not None:
            Path(name).write_bytes(content)
        raw = yaml.safe_load(Path(EXAMPLE).read_text())
        raw["spec"]["data"] = {"promptsFile": name}
        Path("job.yaml").write_text(yaml.safe_dump(raw))
        done = shell("submit", "job.yaml", *STORE)
        assert done.code == ExitCode.INVALID
        assert "spec.data.promptsFile: " in done.err
        assert told in done.err

    def test_a_local_model_is_refused(self, shell: Shell) -> None:
        done = shell("submit", EXAMPLE, *STORE, "--set", "spec.model.source=./weights")
        assert "spec.model.source: got ./weights, a folder of this machine" in done.err

    def test_dry_runs(self, shell: Shell) -> None:
        named = (*STORE, "--set", "metadata.name=never")
        sent = yaml.safe_load(shell("submit", EXAMPLE, *named, "--dry-run=client").out)
        assert "optimizer" not in sent["spec"] or "beta1" not in sent["spec"]["optimizer"]
        done = shell("submit", EXAMPLE, *named, "--dry-run=server")
        assert done.out == "default/never: would be accepted\n"
        assert shell("status", "never").code == ExitCode.NOT_FOUND

    def test_a_dry_run_shows_the_prompts_that_would_go_along(self, shell: Shell) -> None:
        Path("prompts.txt").write_text("a three\n")
        raw = yaml.safe_load(Path(EXAMPLE).read_text())
        raw["spec"]["data"] = {"promptsFile": "prompts.txt"}
        Path("job.yaml").write_text(yaml.safe_dump(raw))
        done = shell("submit", "job.yaml", *STORE, "--dry-run=client")
        assert done.err == ""
        prompts, job = yaml.safe_load_all(done.out)
        assert prompts["kind"] == "ConfigMap"
        assert prompts["data"] == {job["spec"]["data"]["promptsFile"]: "a three\n"}
        assert prompts["metadata"]["name"] == job["spec"]["data"]["promptsConfigMap"]

    def test_wait_tells_the_end(self, shell: Shell, api: ApiServer) -> None:
        threading.Timer(1, lambda: set_status(api, "w1", SUCCEEDED)).start()
        done = shell("submit", EXAMPLE, *STORE, "--set", "metadata.name=w1", "--wait")
        assert done.code == 0
        assert "w1: Succeeded (Completed: all epochs are trained)" in done.out
        assert done.out.endswith("next: tempflow pull job/w1 -n default\n")

    def test_a_failure_while_waiting(self, shell: Shell, api: ApiServer) -> None:
        threading.Timer(1, lambda: set_status(api, "w2", FAILED)).start()
        done = shell("submit", EXAMPLE, *STORE, "--set", "metadata.name=w2", "--wait")
        assert done.code == ExitCode.JOB_FAILED
        assert "error: job default/w2 failed: PermanentFailure: exit code 81" in done.err

    def test_follow_prints_logs_alone_on_stdout(
        self, shell: Shell, api: ApiServer, client: Client
    ) -> None:
        kubelet = Kubelet(*api.certificate())
        add_node(api, kubelet)

        def act() -> None:
            time.sleep(1)
            name, log = add_pod(api, kubelet, "w3", client.get("w3").uid)
            log.write(1, "epoch 1")
            log.write(2, "epoch 2")
            end_pod(api, name, log)
            set_status(api, "w3", SUCCEEDED)

        threading.Thread(target=act).start()
        named = ("--set", "metadata.name=w3", "--set", "spec.compute.nodes=1")
        done = shell("submit", EXAMPLE, *STORE, *named, "-o", "name", "--follow")
        kubelet.close()
        assert done.code == 0
        assert done.out == "w3\nepoch 1\nepoch 2\n"
        assert "w3: Succeeded" in done.err

    def test_follow_ends_with_the_patience_of_its_user(
        self, shell: Shell, api: ApiServer, client: Client
    ) -> None:
        kubelet = Kubelet(*api.certificate())
        add_node(api, kubelet)

        def begin() -> None:
            time.sleep(1)
            add_pod(api, kubelet, "w4", client.get("w4").uid)[1].write(1, "epoch 1")

        threading.Thread(target=begin).start()
        done = shell(
            *("submit", EXAMPLE, *STORE, "--set", "metadata.name=w4", "-o", "name"),
            *("--set", "spec.compute.nodes=1", "--follow", "--timeout", "4s"),
        )
        kubelet.close()
        assert (done.code, done.out) == (ExitCode.TIMEOUT, "w4\nepoch 1\n")
        assert "the log goes on after 4 s" in done.err


RUNNING = status(
    "Running",
    condition(ConditionType.RUNNING, "PodsRunning"),
    attempt=1,
    progressText="3/10",
    progress={
        "epoch": 3,
        "epochs": 10,
        "phase": "rollout",
        "reward": 0.25,
        "rewardCourse": [-1, -0.5, 0.25],
        "etaSeconds": 65.0,
        "time": WHEN,
    },
    attempts=[{"number": 1, "outcome": "Active", "startTime": WHEN}],
)


class TestLooking:
    def test_list(self, shell: Shell, client: Client, api: ApiServer) -> None:
        client.submit(digits("seen"))
        set_status(api, "seen", RUNNING)
        head, *rows = shell("list").out.splitlines()
        assert head.split() == ["NAME", "PHASE", "NODES", "PROGRESS", "REWARD", "RESTARTS", "AGE"]
        (row,) = [row.split() for row in rows if row.startswith("seen ")]
        assert row[:6] == ["seen", "Running", "1", "3/10", "0.25", "0"]
        assert "seen" in shell("list", "-o", "name").out.splitlines()
        assert "default/seen" in shell("list", "-A", "-o", "name").out.splitlines()
        listed = json.loads(shell("list", "-o", "json").out)
        assert listed["kind"] == "List"
        assert shell("list", "-n", "empty").err == "no jobs in namespace empty\n"

    def test_status_in_a_pipe(self, shell: Shell, client: Client, api: ApiServer) -> None:
        client.submit(digits("line"))
        set_status(api, "line", RUNNING)
        done = shell("status", "line")
        assert done.out == (
            "line: Running, epoch 3/10, reward 0.25, 1:05 left\n  reward  ▁▄█  -1 -> 0.25\n"
        )
        assert yaml.safe_load(shell("status", "line", "-o", "yaml").out)["status"] == RUNNING

    def test_status_in_a_terminal_is_a_view_until_the_end(
        self, client: Client, api: ApiServer
    ) -> None:
        client.submit(digits("live"))
        set_status(api, "live", RUNNING)
        shown = in_terminal(
            api, ("status", "live"), then=lambda: set_status(api, "live", SUCCEEDED)
        )
        assert "3/10" in shown
        assert "▁▄█" in shown  # also of the epochs before anybody looked
        assert "reward" in shown
        assert "━" in shown
        assert (
            "live: Succeeded, epoch 3/10, reward 0.25 (Completed: all epochs are trained)" in shown
        )

    def test_describe(self, shell: Shell, client: Client, api: ApiServer) -> None:
        client.submit(digits("whole"))
        failure = {"pod": "whole-a1-0-x", "exitCode": 81, "message": "a reward failed"}
        ended = {"number": 1, "outcome": "Failed", "failure": failure}
        set_status(api, "whole", {**FAILED, "attempts": [ended]})
        out = shell("describe", "whole").out
        assert out.startswith("whole: Failed (PermanentFailure: exit code 81")
        assert "Failed     True" in " ".join(out.split(" "))
        assert "whole-a1-0-x, exit code 81, a reward failed" in out
        assert f"s3://bucket/runs/{client.get('whole').run_folder}" in out


def in_terminal(api: ApiServer, words: tuple[str, ...], *, then: Callable[[], None]) -> str:
    """What a command shows in a terminal; ``then`` happens once it has begun to show."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "KUBECONFIG": str(api.kubeconfig("admin")), "TERM": "xterm"}
    environment["COLUMNS"] = "120"
    command = [sys.executable, "-m", "tempflow", *words]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown, acted, deadline = b"", False, time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # its end
                break
        if b"3/10" in shown and not acted:
            acted = True
            then()
    assert process.wait(10) == 0
    os.close(ours)
    return shown.decode()


def completions(kubeconfig: str, words: str) -> subprocess.CompletedProcess[str]:
    """What a shell would offer: a process, as the command's own name is part of the question."""
    asked = {
        "KUBECONFIG": kubeconfig,
        "_TEMPFLOW_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": "2",
    }
    command = [str(Path(sys.executable).with_name("tempflow"))]
    return subprocess.run(
        command, env=os.environ | asked, capture_output=True, text=True, timeout=60, check=False
    )


class TestCompletion:
    def test_names_of_jobs(self, api: ApiServer, client: Client) -> None:
        client.submit(digits("complete-me"))
        offered = completions(str(api.kubeconfig("admin")), "tempflow status complete-")
        assert offered.stdout.split() == ["complete-me"]

    def test_without_a_cluster_there_is_nothing_to_offer(self) -> None:
        offered = completions("none", "tempflow status x")
        assert (offered.stdout.strip(), offered.stderr) == ("", "")


class TestSteering:
    def test_suspend_resume_cancel_delete(self, shell: Shell, client: Client) -> None:
        client.submit(digits("steer"))
        assert shell("suspend", "steer").code == 0
        assert client.get("steer").spec.run_policy.suspend
        assert shell("resume", "steer").out == "steer: resumed\n"
        assert not client.get("steer").spec.run_policy.suspend
        shell("cancel", "steer")
        assert client.get("steer").spec.run_policy.cancel
        assert shell("delete", "steer", "--timeout", "30s").out == "steer: deleted\n"
        assert shell("delete", "steer").code == ExitCode.NOT_FOUND

    def test_for_programs(self, shell: Shell, client: Client) -> None:
        """Objects, of those before an error too; a list where several were asked for."""
        for name in ("one-of", "two-of"):
            client.submit(digits(name))
        told = json.loads(shell("suspend", "one-of", "-o", "json").out)
        assert told["spec"]["runPolicy"]["suspend"] is True
        both = yaml.safe_load(shell("resume", "one-of", "two-of", "-o", "yaml").out)
        assert [item["metadata"]["name"] for item in both["items"]] == ["one-of", "two-of"]
        stopped = shell("cancel", "one-of", "nope", "two-of", "-o", "json")
        assert stopped.code == ExitCode.NOT_FOUND
        assert [i["spec"]["runPolicy"]["cancel"] for i in json.loads(stopped.out)["items"]] == [
            True
        ]
        whole = json.loads(shell("describe", "two-of", "-o", "json").out)
        assert whole["job"]["metadata"]["name"] == "two-of"
        assert whole["events"] == []
        assert shell("delete", "one-of", "two-of", "-o", "name").out == "one-of\ntwo-of\n"

    def test_wait(self, shell: Shell, client: Client, api: ApiServer) -> None:
        client.submit(digits("until"))
        done = shell("wait", "until", "--for", "Running", "--timeout", "1s")
        assert done.code == ExitCode.TIMEOUT
        assert done.err.startswith("error: job default/until: not Running after 1 s")
        set_status(api, "until", RUNNING)
        came = shell("wait", "until", "--for", "Running")
        assert came.out.endswith("\nuntil: Running (PodsRunning)\n")
        waited = shell("wait", "until", "--for", "Running", "-o", "json")
        assert json.loads(waited.out)["status"]["conditions"]
        set_status(api, "until", FAILED)
        assert shell("wait", "until").code == ExitCode.JOB_FAILED
        assert shell("wait", "until", "--for", "Nonsense").code == ExitCode.INVALID

    def test_diff(self, shell: Shell) -> None:
        named = (*STORE, "--set", "metadata.name=diff")
        shell("submit", EXAMPLE, *named)
        assert shell("diff", EXAMPLE, *named).code == 0
        done = shell("diff", EXAMPLE, *named, "--set", "spec.algorithm.epochs=7")
        assert done.code == ExitCode.DIFFERENT
        assert done.out.startswith("spec.algorithm.epochs: ")
        assert done.out.endswith("-> 7 (mutable while suspended)\n")


class TestErrorsAreOneLine:
    @pytest.mark.parametrize(
        "words", [("list",), ("status", "x"), ("logs", "x"), ("delete", "x"), ("wait", "x")]
    )
    def test_no_cluster(
        self, shell: Shell, api: ApiServer, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
    ) -> None:
        gone = api.kubeconfig("admin", server=f"https://127.0.0.1:{free_port()}")
        monkeypatch.setenv("KUBECONFIG", str(gone))
        one_line(shell(*words), ExitCode.UNREACHABLE, "is the cluster up")

    def test_an_expired_token(
        self, shell: Shell, api: ApiServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig("admin", token="old")))
        one_line(shell("list"), ExitCode.UNAUTHORIZED, "Log in to the cluster again")

    def test_forbidden(self, shell: Shell, api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig("nobody")))
        one_line(shell("list"), ExitCode.FORBIDDEN, "tempflow doctor")

    def test_no_such_job(self, shell: Shell) -> None:
        one_line(shell("status", "nope"), ExitCode.NOT_FOUND, "tempflow list -A")

    def test_no_definition(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        unknown = replace(JOBS, api=f"apis/{naming.GROUP}/v9")
        monkeypatch.setattr("tempflow.cluster.client.JOBS", unknown)
        one_line(shell("list"), ExitCode.NOT_FOUND, "helm install")

    def test_an_unknown_context(self, shell: Shell) -> None:
        one_line(shell("list", "--context", "x"), ExitCode.UNREACHABLE, "there are: admin")


def one_line(done: Done, code: ExitCode, told: str) -> None:
    assert done.code == code
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert told in line
