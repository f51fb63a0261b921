"""A job run here, with a real child process in the trainer's place."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tempflow import local
from tempflow.manifest import Manifest, read
from tempflow.record import Record
from tempflow.refused import Refused
from tempflow_api.errors import ExitCode, ManifestInvalid, StoreUnavailable
from tempflow_api.record import Evaluation, Metrics
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import TempFlowGRPOJob
from tests.records import make_evaluation, make_metrics
from tests.unit.sdk.manifests import write

FAKE = Path(__file__).with_name("fake_trainer.py")


def fake(behaviour: str) -> list[str]:
    return [sys.executable, str(FAKE), behaviour]


class Listener:
    """Writes down what it is told; does something at the first epoch, and at a notice."""

    def __init__(
        self,
        at_epoch: Callable[[], None] = lambda: None,
        at_notice: Callable[[], None] = lambda: None,
    ) -> None:
        self.events: list[str] = []
        self.rewards: list[float] = []
        self.earlier: list[int] = []
        self.last: Progress | None = None
        self._at_epoch, self._at_notice = at_epoch, at_notice

    def began(self, job: TempFlowGRPOJob, folder: Path, earlier: Sequence[Metrics]) -> None:
        self.events.append(f"began {job.metadata.name} in {folder.name}")
        self.earlier = [metrics.epoch for metrics in earlier]

    def progressed(self, progress: Progress) -> None:
        self.last = progress

    def trained(self, metrics: Metrics, progress: Progress | None) -> None:
        self.events.append(f"epoch {metrics.epoch}")
        self.rewards.append(metrics.reward)
        if metrics.epoch == 1:
            self._at_epoch()

    def evaluated(self, evaluation: Evaluation) -> None:
        self.events.append(f"evaluation {evaluation.epoch}")

    def notice(self, text: str) -> None:
        self.events.append(text)
        self._at_notice()

    def ended(self) -> None:
        self.events.append("ended")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return read(str(write(tmp_path)))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def assert_gone(*pids: int) -> None:
    """Each process has ended, give or take the time that the system takes to bury it."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if _alive(pid)]
        if not alive:
            return
        time.sleep(0.01)
    raise AssertionError(f"still there: {alive}")


def _alive(pid: int) -> bool:
    listing = subprocess.run(
        ["/bin/ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return bool(listing.stdout.strip()) and not listing.stdout.startswith("Z")


class TestDone:
    def test_everything_is_told_in_order_and_summed_up(
        self, manifest: Manifest, runs: Path
    ) -> None:
        listener = Listener()
        outcome = local.run(manifest, listener, work_dir=runs, command=fake("train"))
        assert outcome.code == ExitCode.DONE
        assert outcome.problem is None
        assert outcome.summary is not None
        assert outcome.summary.reward_after.mean == -1.0
        assert listener.events[0] == "began demo in demo"
        assert [e for e in listener.events if e.startswith("epoch")] == [
            f"epoch {n}" for n in range(1, 5)
        ]
        assert {"evaluation 0", "evaluation 4"} < set(listener.events)
        assert listener.events[-1] == "ended"
        assert listener.last is not None
        assert listener.last.phase == "done"

    def test_the_same_command_continues(self, manifest: Manifest, runs: Path) -> None:
        (runs / "demo/record").mkdir(parents=True)
        done = [make_metrics(epoch, -2.0).model_dump_json(by_alias=True) for epoch in (1, 2)]
        text = "".join(f"{line}\n" for line in done)
        (runs / "demo/record/metrics.jsonl").write_text(text)
        listener = Listener()
        local.run(manifest, listener, work_dir=runs, command=fake("train"))
        assert listener.earlier == [1, 2]
        assert [e for e in listener.events if e.startswith("epoch")] == ["epoch 3", "epoch 4"]

    def test_what_the_trainer_gets(self, manifest: Manifest, runs: Path) -> None:
        local.run(manifest, Listener(), work_dir=runs, command=fake("report_environment"))
        folder = runs / "demo"
        assert json.loads((folder / "environment.json").read_text()) == {
            "TEMPFLOW_ATTEMPT": "0",
            "TEMPFLOW_JOB_FILE": str(folder / "job.json"),
            "TEMPFLOW_WORK_DIR": str(folder),
        }
        assert (folder / "session").read_text() == "True"
        resolved = TempFlowGRPOJob.model_validate_json((folder / "job.json").read_text())
        assert resolved == manifest.job

    def test_the_signal_handlers_are_put_back(self, manifest: Manifest, runs: Path) -> None:
        before = signal.getsignal(signal.SIGINT)
        local.run(manifest, Listener(), work_dir=runs, command=fake("train"))
        assert signal.getsignal(signal.SIGINT) is before


class TestFailure:
    def test_the_last_error_line_is_the_problem(self, manifest: Manifest, runs: Path) -> None:
        outcome = local.run(manifest, Listener(), work_dir=runs, command=fake("fail"))
        assert outcome.code == ExitCode.DIVERGED
        assert outcome.problem == "the loss is not finite at epoch 2"
        assert outcome.log.read_text().splitlines()[-1] == "bye"
        assert outcome.summary is None

    def test_errors_of_an_earlier_start_do_not_count(self, manifest: Manifest, runs: Path) -> None:
        local.run(manifest, Listener(), work_dir=runs, command=fake("fail"))
        outcome = local.run(manifest, Listener(), work_dir=runs, command=fake("fail_silently"))
        assert outcome.problem == "the trainer failed with exit code 3"
        assert "not finite" in outcome.log.read_text()

    def test_a_code_of_the_trainer_s_own_without_a_line_in_the_log(
        self, manifest: Manifest, runs: Path
    ) -> None:
        outcome = local.run(manifest, Listener(), work_dir=runs, command=fake("fail_without_a_log"))
        assert outcome.code == ExitCode.STORE
        assert outcome.problem == (
            "the trainer failed with exit code 88 (The checkpoint store, or the run's own folder, "
            "is missing, full or refuses.) and could not log why: is the disk of "
            f"{outcome.folder} full?"
        )

    def test_killed_from_outside(self, manifest: Manifest, runs: Path) -> None:
        outcome = local.run(manifest, Listener(), work_dir=runs, command=fake("be_killed"))
        assert outcome.code == 137
        assert outcome.problem == "the trainer was killed (SIGKILL); most often, memory ran out"

    def test_what_a_dead_trainer_leaves_behind_is_ended(
        self, manifest: Manifest, runs: Path
    ) -> None:
        local.run(manifest, Listener(), work_dir=runs, command=fake("die_with_a_child_left"))
        assert_gone(int((runs / "demo/pids").read_text()))


class TestStop:
    def test_ctrl_c_stops_after_a_checkpoint(self, manifest: Manifest, runs: Path) -> None:
        listener = Listener(at_epoch=interrupt)
        outcome = local.run(manifest, listener, work_dir=runs, command=fake("stop_on_request"))
        assert outcome.code == ExitCode.INTERRUPTED
        assert outcome.problem is None
        assert listener.events.count("stopping after a checkpoint, press Ctrl-C again to kill") == 1
        assert listener.last is not None
        assert listener.last.phase == "checkpoint"

    def test_sigterm_does_too_and_keeps_the_trainers_code(
        self, manifest: Manifest, runs: Path
    ) -> None:
        listener = Listener(at_epoch=lambda: os.kill(os.getpid(), signal.SIGTERM))
        outcome = local.run(manifest, listener, work_dir=runs, command=fake("stop_on_request"))
        assert outcome.code == ExitCode.PREEMPTED

    def test_a_trainer_that_could_not_stop_in_time_says_so(
        self, manifest: Manifest, runs: Path
    ) -> None:
        listener = Listener(at_epoch=lambda: os.kill(os.getpid(), signal.SIGTERM))
        outcome = local.run(manifest, listener, work_dir=runs, command=fake("stop_too_late"))
        assert (outcome.code, outcome.problem) == (143, "killed before it could stop")

    def test_a_trainer_that_is_still_starting_just_ends(
        self, manifest: Manifest, runs: Path
    ) -> None:
        listener = Listener()
        began = listener.began

        def stop_at_once(job: TempFlowGRPOJob, folder: Path, earlier: Sequence[Metrics]) -> None:
            began(job, folder, earlier)
            interrupt()

        listener.began = stop_at_once  # type: ignore[method-assign]
        sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
        outcome = local.run(manifest, listener, work_dir=runs, command=sleeper)
        assert (outcome.code, outcome.problem) == (ExitCode.INTERRUPTED, None)

    def test_a_second_ctrl_c_kills_everything(self, manifest: Manifest, runs: Path) -> None:
        listener = Listener(at_epoch=interrupt, at_notice=interrupt)
        outcome = local.run(manifest, listener, work_dir=runs, command=fake("ignore_requests"))
        assert outcome.code == ExitCode.INTERRUPTED
        assert "killed" in listener.events
        assert_gone(*map(int, (runs / "demo/pids").read_text().split()))

    def test_an_error_in_the_view_leaves_no_process(self, manifest: Manifest, runs: Path) -> None:
        def fail() -> None:
            raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            local.run(
                manifest, Listener(at_epoch=fail), work_dir=runs, command=fake("ignore_requests")
            )
        assert_gone(*map(int, (runs / "demo/pids").read_text().split()))


class TestLock:
    def test_a_second_run_of_the_same_name_is_refused(self, manifest: Manifest, runs: Path) -> None:
        refusals: list[str] = []

        def run_again() -> None:
            with pytest.raises(Refused) as caught:
                local.run(manifest, Listener(), work_dir=runs, command=fake("train"))
            refusals.append(str(caught.value))

        outcome = local.run(
            manifest, Listener(at_epoch=run_again), work_dir=runs, command=fake("train")
        )
        assert outcome.code == ExitCode.DONE
        assert refusals == [
            (
                f"{runs / 'demo'} is in use by another 'tempflow run' (process {os.getpid()}): "
                "wait for it or stop it, or give this job another metadata.name"
            )
        ]

    def test_a_trainer_that_outlives_its_parent_holds_it(
        self, manifest: Manifest, runs: Path
    ) -> None:
        program = (
            "import sys; from pathlib import Path; from tempflow import local, manifest;"
            "from tests.unit.sdk.test_local import Listener, fake;"
            "local.run(manifest.read(sys.argv[1]), Listener(), work_dir=Path(sys.argv[2]),"
            " command=fake('ignore_requests'))"
        )
        job = str(runs.parent / "job.yaml")
        parent = subprocess.Popen([sys.executable, "-c", program, job, str(runs)])
        pids = runs / "demo/pids"
        while not (pids.exists() and len(pids.read_text().split()) == 2):
            time.sleep(0.02)
        parent.kill()
        parent.wait()
        trainer, worker = map(int, pids.read_text().split())
        try:
            with pytest.raises(Refused, match="is in use"):
                local.run(manifest, Listener(), work_dir=runs, command=fake("train"))
        finally:
            os.kill(trainer, signal.SIGKILL)
            os.kill(worker, signal.SIGKILL)
        assert_gone(trainer, worker)
        outcome = local.run(manifest, Listener(), work_dir=runs, command=fake("train"))
        assert outcome.code == ExitCode.DONE


class TestRefusals:
    @pytest.mark.parametrize(
        ("edit", "expected"),
        [
            (
                (
                    "device: cpu",
                    "device: cpu\n    nodes: 2\n  checkpoint: {uri: 's3://bucket/runs'}",
                ),
                (
                    ":36: spec.compute.nodes: got 2: this machine is one node; set it to 1, or "
                    "submit the job to a cluster"
                ),
            ),
            (
                ("  compute:", "  runPolicy: {suspend: true}\n  compute:"),
                ":34: spec.runPolicy.suspend: got true: a suspended job does not run; remove it",
            ),
            (
                ("name: digit-ink", "name: digit-ink\n      placement: service"),
                (
                    ":32: spec.rewards[1].placement: got service: on a cluster the operator serves "
                    "it; here, remove the field to score in the trainer's processes, or serve the "
                    "reward and give service.endpoints"
                ),
            ),
        ],
        ids=["nodes", "suspend", "placement"],
    )
    def test_what_this_machine_cannot_do(
        self, edit: tuple[str, str], expected: str, tmp_path: Path, runs: Path
    ) -> None:
        path = write(tmp_path, edit)
        with pytest.raises(ManifestInvalid) as caught:
            local.run(read(str(path)), Listener(), work_dir=runs, command=fake("train"))
        assert caught.value.lines() == [f"{path}{expected}"]
        assert not runs.exists()

    def test_prompts_that_are_not_there(self, tmp_path: Path, runs: Path) -> None:
        edit = ("prompts:\n      - a three\n      - a four", "promptsFile: prompts.txt")
        path = write(tmp_path, edit)
        with pytest.raises(ManifestInvalid) as caught:
            local.run(read(str(path)), Listener(), work_dir=runs, command=fake("train"))
        missing = (tmp_path / "prompts.txt").resolve()
        assert caught.value.lines() == [
            (
                f"{path}:12: spec.data.promptsFile: there is no file {missing}: write the prompts "
                "there, one a line"
            )
        ]
        (tmp_path / "prompts.txt").write_text("a three\n")
        assert local.problems_here(read(str(path)).job) == []

    def test_a_work_dir_that_cannot_be_written(self, manifest: Manifest, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreUnavailable, match=r"^cannot write .*: not a directory; choose"):
            local.run(manifest, Listener(), work_dir=tmp_path / "file", command=fake("train"))

    def test_a_disk_that_takes_no_more(self, manifest: Manifest, runs: Path) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        try:
            with pytest.raises(StoreUnavailable, match=r"^cannot write .*: file too large; choose"):
                local.run(manifest, Listener(), work_dir=runs, command=fake("train"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert sorted(path.name for path in (runs / "demo").iterdir()) == ["lock", "log"]

    def test_missing_packages_of_the_trainer(self) -> None:
        local.require_trainer(["json"])
        with pytest.raises(Refused) as caught:
            local.require_trainer(["json", "no_such_module"])
        assert str(caught.value) == (
            "training needs no_such_module, not installed here: pip install '.[trainer]' in the "
            "project's folder"
        )

    def test_fresh_refuses_an_earlier_run(self, manifest: Manifest, runs: Path) -> None:
        local.refuse_if_begun(manifest.job, runs)
        local.run(manifest, Listener(), work_dir=runs, command=fake("fail_silently"))
        with pytest.raises(Refused, match=r"holds an earlier run: move it aside \(mv "):
            local.refuse_if_begun(manifest.job, runs)

    def test_fresh_looks_into_the_checkpoint_store_too(self, tmp_path: Path, runs: Path) -> None:
        store = tmp_path / "store"
        edit = ("  compute:", f"  checkpoint: {{uri: {store}}}\n  compute:")
        manifest = read(str(write(tmp_path, edit)))
        local.refuse_if_begun(manifest.job, runs)
        folder = store / "demo/checkpoints/step-0000000002-attempt-000000"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").write_text("{}")
        with pytest.raises(Refused, match="holds checkpoints of an earlier run"):
            local.refuse_if_begun(manifest.job, runs)


def test_what_the_guard_found_is_told(tmp_path: Path) -> None:
    found = {"alarms": ["steps are too long"]}
    lines = {
        "metrics.jsonl": make_metrics(3, 0.5).model_copy(update=found),
        "evaluations.jsonl": make_evaluation(3, 0.5).model_copy(update=found),
    }
    (tmp_path / "record").mkdir()
    for name, line in lines.items():
        (tmp_path / "record" / name).write_text(line.model_dump_json(by_alias=True) + "\n")
    listener = Listener()
    local._telling(Record(tmp_path), listener)()
    alarm = "alarm after epoch 3: steps are too long"
    assert listener.events == ["epoch 3", alarm, "evaluation 3", alarm]
