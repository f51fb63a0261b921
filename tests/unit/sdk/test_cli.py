"""The command line as a user meets it: exit codes, stdout and stderr, files, child processes.

Most tests call the entry point in this process, which saves a second each; what depends on a
process of its own (imports, signals, a terminal) gets one.
"""

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import tempflow
from tempflow.cli import main
from tempflow_api.errors import NOT_IN_TIME, ExitCode
from tests.unit.sdk import stored_runs
from tests.unit.sdk.manifests import write

SOURCES = Path(tempflow.__file__).parents[1]
ROOT = Path(__file__).parents[3]
FAKE = Path(__file__).with_name("fake_trainer.py")


@dataclass(frozen=True)
class Done:
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


class Shell:
    """Runs ``tempflow`` in a folder of its own, with a trainer that trains nothing."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.folder = folder
        self._monkeypatch, self._capfd = monkeypatch, capfd
        package = folder / "fakes/tempflow_trainer"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "launch.py").write_text(
            f"import os, runpy, sys\nsys.argv = ['fake', os.environ['FAKE']]\n"
            f"runpy.run_path({str(FAKE)!r}, run_name='__main__')\n"
        )
        (package / "sample.py").write_text(
            "import json, sys\n\ndef main():\n    print(json.dumps(sys.argv[1:]))\n    return 80\n"
        )
        shutil.copy(ROOT / "trainer/tempflow_trainer/start.py", package)
        monkeypatch.chdir(folder)
        # For the trainer, which is a process of its own always.
        monkeypatch.setenv("PYTHONPATH", f"{folder / 'fakes'}{os.pathsep}{SOURCES}")
        monkeypatch.setenv("FAKE", "train")

    def command(self, *arguments: str) -> list[str]:
        """For a process of its own."""
        return [sys.executable, "-m", "tempflow", *arguments]

    def __call__(self, *arguments: str, stdin: str = "") -> Done:
        self._monkeypatch.setattr(sys, "argv", ["tempflow", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exited:
            main()
        captured = self._capfd.readouterr()
        return Done(int(exited.value.code or 0), captured.out, captured.err)


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Shell:
    write(tmp_path)
    return Shell(tmp_path, monkeypatch, capfd)


@pytest.mark.usefixtures("shell")
def test_help_is_instant() -> None:
    program = (
        "import sys; sys.argv = ['tempflow', '--help']\n"
        "from tempflow.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "Exit codes:" in done.stdout
    assert "tempflow init --preset digits" in done.stdout
    heavy = {"torch", "s3fs", "fsspec", "kubernetes", "aiobotocore", "pydantic", "yaml", "numpy"}
    assert heavy.isdisjoint(eval(done.stderr))


def test_every_exit_code_is_documented(shell: Shell) -> None:
    document = Path(__file__).parents[3] / "docs/run.md"
    in_help = {int(code) for code in re.findall(r"(?:^|  )(\d+)  ", shell("--help").stdout, re.M)}
    in_document = {int(code) for code in re.findall(r"^\| (\d+) \|", document.read_text(), re.M)}
    assert in_help == {int(code) for code in ExitCode}
    assert in_document == in_help | {NOT_IN_TIME}


VERBS = (
    *("init", "validate", "explain", "run", "sample", "checkpoints list", "pull", "report"),
    *("rewards list", "rewards score"),
)
CLUSTER_VERBS = (
    *("submit", "list", "status", "describe", "logs", "events", "wait"),
    *("suspend", "resume", "cancel", "delete", "diff", "doctor"),
)


@pytest.mark.parametrize("verb", [*VERBS, *CLUSTER_VERBS, "completion"])
def test_every_verb_teaches_by_example(shell: Shell, verb: str) -> None:
    shown = shell(*verb.split(), "--help").stdout
    assert "Examples:\n" in shown
    assert f"tempflow {verb}" in shown.partition("Examples:\n")[2]


@pytest.mark.parametrize("verb", CLUSTER_VERBS)
def test_every_cluster_verb_takes_a_context_and_a_namespace(shell: Shell, verb: str) -> None:
    shown = shell(verb, "--help").stdout
    assert all(option in shown for option in ("--context", "--kubeconfig", "-n, --namespace"))


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_that_shell(shell: Shell, name: str) -> None:
    done = shell("completion", name)
    assert done.returncode == 0
    assert "_TEMPFLOW_COMPLETE" in done.stdout
    assert f"complete_{name}" in done.stdout


class TestInitAndValidate:
    def test_from_preset_to_valid_file(self, shell: Shell) -> None:
        made = shell("init", "--preset", "digits")
        assert (made.returncode, made.stdout) == (
            0,
            (
                "wrote digits.yaml; next: tempflow validate digits.yaml, then tempflow run "
                "digits.yaml\n"
            ),
        )
        assert shell("validate", "digits.yaml").stdout == "digits.yaml: valid, job digits\n"

    def test_a_second_time_is_refused(self, shell: Shell) -> None:
        shell("init", "--preset", "digits", "-o", "job2.yaml")
        again = shell("init", "--preset", "digits", "-o", "job2.yaml")
        assert (again.returncode, again.stderr) == (
            2,
            "error: job2.yaml exists: choose another with -o, or overwrite with --force\n",
        )
        assert shell("init", "--preset", "digits", "-o", "job2.yaml", "--force").returncode == 0

    def test_through_a_pipe(self, shell: Shell) -> None:
        text = shell("init", "--preset", "flux-hpsv3", "-o", "-").stdout
        assert shell("validate", "-", stdin=text).stdout == "-: valid, job flux-hpsv3\n"

    def test_list_and_nothing(self, shell: Shell) -> None:
        assert "digits\n    Teach" in shell("init", "--list").stdout
        nothing = shell("init")
        assert nothing.returncode == 2
        assert "which preset? --list shows them" in nothing.stderr

    def test_every_problem_of_every_file(self, shell: Shell) -> None:
        (shell.folder / "b.yaml").write_text("kind: Job\n")
        write(shell.folder, ("    steps: 10", "    step: 10"))
        done = shell("validate", "job.yaml", "b.yaml")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.splitlines() == [
            "job.yaml:16: spec.sampling.step: unknown field; did you mean 'steps'?",
            "b.yaml:1: apiVersion: is missing: expects 'tempflow.dev/v1alpha1'",
            "b.yaml:1: kind: got 'Job': expects 'TempFlowGRPOJob'",
            "b.yaml:1: metadata: is missing: expects a block with name",
            "b.yaml:1: spec: is missing: expects a block with model, data, rewards, compute",
        ]

    def test_for_programs(self, shell: Shell) -> None:
        done = shell("validate", "job.yaml", "no.yaml", "-o", "json")
        assert done.returncode == 2
        assert json.loads(done.stdout) == [
            {"file": "job.yaml", "valid": True, "job": "demo", "problems": []},
            {
                "file": "no.yaml",
                "valid": False,
                "job": None,
                "problems": [
                    {
                        "line": None,
                        "path": "manifest",
                        "message": "cannot be read: no such file or directory",
                    }
                ],
            },
        ]


class TestRun:
    def test_in_a_pipe(self, shell: Shell) -> None:
        done = shell("run", "job.yaml")
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[0] == "demo: 4 epochs on cpu; log in runs/demo/log/trainer.log"
        assert "evaluation after epoch 0: reward -2 (digit-ink -2, diversity 0.3)" in lines
        epochs = [line for line in lines if line.startswith("epoch")]
        assert epochs[0].split("  ")[:2] == ["epoch 1/4", "reward -1.75 ± 0.5"]
        assert len(epochs) == 4
        end = lines.index("demo: done, 4 epochs")
        folder = shell.folder / "runs/demo"
        assert lines[end:] == [
            "demo: done, 4 epochs",
            "  reward       -2 ± 0.5 -> -1 ± 0.25",
            "    digit-ink  -0.5 -> -0.125",
            "  diversity    0.34 -> 0.29",
            "  work         71,400 network evaluations, 21,600 images scored",
            (
                "  time         1:03 in phases: rollout 0:40, scoring 0:02, update 0:15, "
                "evaluation 0:05, checkpoint 0:01"
            ),
            "  peak memory  610.4 MiB, of the largest process",
            f"  result       {folder}/checkpoints/step-0000000004-attempt-000000",
            "next: tempflow sample runs/demo --prompt 'a three' --out grid.png",
        ]

    def test_as_json(self, shell: Shell) -> None:
        done = shell("run", "job.yaml", "-o", "json", "--set", "spec.algorithm.epochs=2")
        assert json.loads(done.stdout)["rewardAfter"] == {"mean": -1.0, "std": 0.25}
        assert "epoch 2/2" in done.stderr

    def test_in_a_terminal(self, shell: Shell) -> None:
        output = in_terminal(shell.command("run", "job.yaml"))
        assert "evaluation after epoch 4" in output
        assert "demo: done, 4 epochs" in output
        assert "━" in output
        assert "▁" in output
        assert "epoch 1/4" not in output

    def test_plain_in_a_terminal(self, shell: Shell) -> None:
        output = in_terminal(shell.command("run", "job.yaml", "--plain"))
        assert "epoch 1/4  reward -1.75" in output
        assert "━" not in output

    def test_failure(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FAKE", "fail")
        done = shell("run", "job.yaml")
        assert done.returncode == 83
        assert done.stderr.splitlines() == [
            "error: the loss is not finite at epoch 2",
            "log: runs/demo/log/trainer.log",
        ]
        assert "Traceback" not in done.stdout

    def test_ctrl_c(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FAKE", "stop_on_request")
        child = subprocess.Popen(
            shell.command("run", "job.yaml", "--set", "spec.algorithm.epochs=9"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        while not child.stdout.readline().startswith("epoch 1"):
            pass
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
        assert child.returncode == 130
        assert "stopping after a checkpoint, press Ctrl-C again to kill" in out
        assert err == (
            "stopped: the checkpoint after epoch 2 is kept; the same command continues: "
            "tempflow run job.yaml --set spec.algorithm.epochs=9\n"
        )

    def test_without_the_trainers_packages(
        self, shell: Shell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As the import system sees a package that is not there.
        monkeypatch.setitem(sys.modules, "torch", None)
        done = shell("run", "job.yaml")
        assert (done.returncode, done.stderr) == (
            2,
            (
                "error: training needs torch, not installed here: "
                "pip install '.[trainer]' in the project's folder\n"
            ),
        )
        assert not (shell.folder / "runs").exists()

    def test_what_is_wrong_with_the_manifest(self, shell: Shell) -> None:
        done = shell("run", "job.yaml", "--set", "spec.runPolicy.suspend=true")
        assert (done.returncode, done.stderr.splitlines()) == (
            2,
            [
                (
                    "job.yaml: spec.runPolicy.suspend: got true: a suspended job does not run; "
                    "remove it"
                ),
                "error: job.yaml: 1 problem",
            ],
        )

    def test_fresh(self, shell: Shell) -> None:
        assert shell("run", "job.yaml", "--fresh").returncode == 0
        again = shell("run", "job.yaml", "--fresh")
        assert (again.returncode, again.stderr) == (
            2,
            (
                "error: runs/demo holds an earlier run: move it aside (mv runs/demo "
                "runs/demo.old), or leave out --fresh to continue it\n"
            ),
        )
        assert "continuing after epoch 4" in shell("run", "job.yaml").stdout

    def test_a_work_dir_that_cannot_be_written(self, shell: Shell) -> None:
        done = shell("run", "job.yaml", "--work-dir", "job.yaml")
        assert (done.returncode, done.stderr) == (
            88,
            "error: cannot write job.yaml/demo: not a directory; choose another --work-dir\n",
        )


class TestSample:
    def test_what_the_sampler_gets(self, shell: Shell) -> None:
        done = shell(
            *("sample", ".", "--prompt", "a three", "--prompt", "--x", "--count", "4", "--base"),
            *("--device", "cpu"),
        )
        assert done.returncode == 80
        assert json.loads(done.stdout) == [
            "--from=.",
            "--prompt=a three",
            "--prompt=--x",
            "--count=4",
            "--seed=0",
            "--out=grid.png",
            "--base",
            "--device=cpu",
        ]

    def test_a_folder_that_is_not_there(self, shell: Shell) -> None:
        done = shell("sample", "runs/no", "--prompt", "a three")
        assert (done.returncode, done.stderr) == (
            2,
            "error: there is no folder runs/no: expects that of a run, checkpoint or result\n",
        )

    def test_a_store_is_not_a_folder(self, shell: Shell) -> None:
        done = shell("sample", "s3://bucket/runs/digits", "--prompt", "a three")
        uri = "s3://bucket/runs/digits"
        told = f"{uri} is not on this machine: 'tempflow pull {uri}' first, then its folder"
        assert (done.returncode, done.stderr) == (2, f"error: {told}\n")

    def test_a_picture_in_no_folder(self, shell: Shell) -> None:
        done = shell("sample", ".", "--prompt", "a three", "--out", "no/grid.png")
        assert done.stderr == "error: cannot write the picture no/grid.png: its folder must exist\n"


class TestCheckpoints:
    @pytest.fixture(autouse=True)
    def stored(self, shell: Shell) -> None:
        for path, content in stored_runs.run().items():
            target = shell.folder / "runs/demo" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def test_list(self, shell: Shell) -> None:
        assert shell("checkpoints", "list", "runs/demo").stdout.splitlines() == [
            "STEP  ATTEMPT  TIME                  SIZE      RESULT   FOLDER",
            (
                "10    0        2026-01-31T12:00:00Z  10.3 KiB  adapter  "
                "step-0000000010-attempt-000000"
            ),
            (
                "20    0        2026-01-31T12:00:00Z  10.3 KiB  adapter  "
                "step-0000000020-attempt-000000"
            ),
            (
                "20    1        2026-01-31T12:00:00Z  10.3 KiB  adapter  "
                "step-0000000020-attempt-000001"
            ),
        ]
        listed = json.loads(shell("checkpoints", "list", "runs/demo", "-o", "json").stdout)
        assert [entry["step"] for entry in listed] == [10, 20, 20]
        assert shell("checkpoints", "list", "runs").stdout == "no complete checkpoint at runs\n"

    def test_a_folder_that_is_not_there(self, shell: Shell) -> None:
        done = shell("checkpoints", "list", "runs/dmeo")
        told = "error: there is no folder runs/dmeo: expects that of a run, such as runs/digits\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", told)

    def test_pull(self, shell: Shell) -> None:
        done = shell("pull", "runs/demo", "--step", "10", "--to", "mine")
        assert (done.returncode, done.stdout) == (0, "pulled step 10 to mine\n")
        assert (shell.folder / "mine/MANIFEST.json").exists()
        again = shell("pull", "runs/demo", "--to", "mine")
        assert (again.returncode, again.stderr) == (
            2,
            "error: mine exists: choose another folder with --to\n",
        )


def test_version(shell: Shell) -> None:
    assert shell("version").stdout.startswith("tempflow ")


def in_terminal(command: list[str]) -> str:
    """What ``command`` writes to a terminal."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "PYTHONUTF8": "1"}
    child = subprocess.Popen(
        command, env=environment, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    seen = b""
    deadline = time.monotonic() + 30
    # Reading fails once the last process with the other end is gone.
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            if select.select([leader], [], [], 0.1)[0]:
                seen += os.read(leader, 65536)
    os.close(leader)
    assert child.wait(timeout=5) == 0, seen.decode()
    return seen.decode()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pull", "runs/digits", "--via-cluster"], "expects job/NAME"),
        (["pull", "job/digits", "--image", "trainer"], "add it"),
        (["checkpoints", "list", "job/x", "--via-cluster", "--profile", "p"], "leave them out"),
    ],
)
def test_options_of_reading_inside_that_do_not_fit(
    shell: Shell, words: list[str], said: str
) -> None:
    done = shell(*words)
    assert done.returncode == ExitCode.INVALID
    assert said in done.stderr
