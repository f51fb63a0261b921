"""A run from start to end: epochs, evaluations, checkpoints, and the record of them."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import (
    ConfigChanged,
    Preempted,
    SelfTestFailed,
    TempFlowError,
    TrainingCollapsed,
    TrainingDiverged,
    of_code,
)
from tempflow_api.record import Evaluation as EvaluationLine
from tempflow_api.record import Metrics, SelfTest, Spread
from tempflow_api.rules import Mutability, changed_fields, mutability_of
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import checkpoint, selftest, sharding
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.evaluation import Evaluation, Evaluator, write_grid
from tempflow_trainer.guard import WINDOW, Guard
from tempflow_trainer.loop import Run, run_epoch
from tempflow_trainer.metrics import Record, now
from tempflow_trainer.summary import summarise
from tempflow_trainer.tracking import Tracking

log = logging.getLogger(__name__)

ROLLBACKS = "guard.rollbacks"
"""Among the totals of a run."""


@dataclass
class Session:
    """One process's part in a run; what is written, rank 0 writes."""

    spec: JobSpec
    run: Run
    evaluator: Evaluator
    checkpoints: Checkpoints
    record: Record
    announce: Callable[[Progress], None]
    """Told of every change of progress, on rank 0."""
    run_id: str = ""
    """Which run's progress it is, for whoever asks at this address."""
    tracking: Tracking = field(default_factory=Tracking)
    epochs_done: int = 0
    committed: int | None = None
    committed_uri: str | None = None
    images: int = 0
    evaluations: dict[str, int] = field(default_factory=dict)
    """Rows of the network by purpose, over all ranks, which need not have equal shares."""
    earlier: dict[str, float] = field(default_factory=dict)
    """Totals of the processes before this one."""
    last: Metrics | None = None
    alarms: list[str] = field(default_factory=list)
    """Of the last epoch and evaluation."""
    rolled_back: int = 0
    """Times that this process went back."""

    def __post_init__(self) -> None:
        """The guard of this run."""
        held_out = tuple(t.name for t in self.evaluator.reward.terms if t.weight == 0)
        self.guard = Guard(self.spec.guard, self.spec.algorithm.clip_range, held_out)

    @property
    def rollbacks(self) -> int:
        """Of the whole run."""
        return self.rolled_back + int(self.earlier.get(ROLLBACKS, 0))

    def train(self) -> None:
        """Run what is left to do.

        Raises:
            Preempted: stopped on request; the state is committed.
        """
        self.run.clock.on_phase = self._on_phase
        self._resume()
        self._self_test()
        self.tracking.begin(self.epochs_done or -1)
        try:
            self._to_the_end()
        finally:
            self.tracking.end()

    def _to_the_end(self) -> None:
        try:
            if self.epochs_done == 0:
                self._evaluate()
                if self.spec.guard.action == "rollback" and self.committed is None:
                    self._save()  # there is always a place to go back to
            while self.epochs_done < self.spec.algorithm.epochs:
                self._epoch()
        except Preempted:
            if self.committed != self.epochs_done:
                self._save()
            raise Preempted(
                f"stopped after {self.epochs_done} of {self.spec.algorithm.epochs} epochs; the "
                f"state is committed at {self.committed_uri}"
            ) from None
        self._finish()

    def _self_test(self) -> None:
        """Once for a configuration: its report is kept with the run.

        Raises:
            SelfTestFailed: on every rank.
        """
        if not self.spec.self_test.enabled or self._on_first(self._self_tested):
            return
        report = selftest.examine(self.run, self.evaluator.reward, self.spec)
        problem = selftest.problem(report)
        self._on_first(lambda: self._keep(report, problem))
        if problem:
            raise SelfTestFailed(f"self-test: {problem}")

    def _keep(self, report: SelfTest, problem: str | None) -> str:
        self.record.write(layout.SELF_TEST, report.model_dump_json(by_alias=True, indent=1))
        self._store_record()
        log.info(
            "self-test %s: log-probabilities differ by %.2g between rollout and update, by "
            "%.2g for one row alone (at most %.2g)",
            "failed" if problem else "passed",
            report.rollout_difference,
            report.one_row_difference,
            report.bound,
        )
        return ""

    def _self_tested(self) -> str:
        known = self.record.read(layout.SELF_TEST, SelfTest)
        same = known is not None and known.configuration == selftest.configuration_of(self.spec)
        return "passed" if known and same and selftest.problem(known) is None else ""

    def _epoch(self) -> None:
        before = dict(self.run.clock.seconds)
        evaluations = self.evaluations
        try:
            metrics = run_epoch(self.run, self.epochs_done)
        except TrainingDiverged as error:
            if self.spec.guard.action != "rollback":
                raise
            self._heed([str(error)])
            return
        self.epochs_done += 1
        self._count_evaluations()
        images = self._images_of(self.epochs_done - 1)
        self.images += images
        seconds = self.run.clock.since(before)
        self.last = Metrics.model_validate(
            {
                **metrics,
                "epoch": self.epochs_done,
                "time": now(),
                "images": images,
                "imagesPerSecond": images / max(sum(seconds.values()), 1e-9),
                "seconds": seconds,
                "evaluations": {
                    purpose: count - evaluations.get(purpose, 0)
                    for purpose, count in self.evaluations.items()
                },
                "rollbacks": self.rollbacks,
            }
        )
        self.alarms = self.guard.epoch(self.last)
        self.last = self.last.model_copy(update={"alarms": self.alarms})
        if self.run.ranks.is_first:
            self.record.append(layout.METRICS, self.last)
            self.tracking.epoch(self.last)
            log.info(
                "epoch %d of %d: reward %.4f, %.0f images/s",
                self.epochs_done,
                self.spec.algorithm.epochs,
                self.last.reward,
                self.last.images_per_second,
            )
            if self.last.groups_left_out:
                log.warning(
                    "epoch %d: %d groups of draws lack a required score and are left out",
                    self.epochs_done,
                    self.last.groups_left_out,
                )
        last = self.epochs_done == self.spec.algorithm.epochs
        if last or self.epochs_done % self.spec.evaluation.every_epochs == 0:
            self.alarms = [*self.alarms, *self._evaluate()]
        if self.alarms and self._heed(self.alarms):
            return
        if last or self.epochs_done % self.spec.checkpoint.every_epochs == 0:
            self._save()

    def _heed(self, alarms: list[str]) -> bool:
        """Act upon alarms as ``spec.guard`` says; whether the run went back.

        Raises:
            TrainingCollapsed: it says stop, or the run went back often enough.
        """
        guard, said = self.spec.guard, "; ".join(alarms)
        if self.run.ranks.is_first:
            log.warning("alarm after %d epochs: %s", self.epochs_done, said)
        if guard.action == "warn":
            return False
        advice = "lower spec.optimizer.learningRate, or set spec.guard.action: warn to go on"
        if guard.action == "stop" or self.rollbacks == guard.max_rollbacks:
            self._on_phase("update")
            tries = f" after {self.rollbacks} rollbacks" if self.rollbacks else ""
            raise TrainingCollapsed(
                f"the guard stopped the run at epoch {self.epochs_done}{tries}: {said}; {advice}"
            )
        self._roll_back()
        return True

    def _roll_back(self) -> None:
        """Go on from the newest checkpoint, more slowly, and commit that at once: a crash after it
        must not go back to the higher rate."""
        found = self._on_first(lambda: self.checkpoints.newest_sound() or "")
        earlier = self.earlier
        self._restore(self.checkpoints.load(found))
        self.earlier = earlier  # what was thrown away has been computed, too
        self.rolled_back += 1
        self._set_learning_rate()
        if self.run.ranks.is_first:
            self.record.cut_back(self.epochs_done)
            self.tracking.begin(self.epochs_done)
            log.warning(
                "went back to epoch %d, rollback %d of %d; the learning rate is %.3g now",
                self.epochs_done,
                self.rollbacks,
                self.spec.guard.max_rollbacks,
                self.run.optimizer.param_groups[0]["lr"],
            )
        self._remind_guard()
        self._save()

    def _set_learning_rate(self) -> None:
        factor = self.spec.guard.learning_rate_factor**self.rollbacks
        for group in self.run.optimizer.param_groups:
            group["lr"] = self.spec.optimizer.learning_rate * factor

    def _remind_guard(self) -> None:
        """Tell the guard of every rank what rank 0 has recorded."""
        said = ""
        if self.run.ranks.is_first:
            epochs = self.record.lines(layout.METRICS, Metrics)
            evaluations = self.record.lines(layout.EVALUATIONS, EvaluationLine)
            kept = [*epochs[:1], *epochs[1:][-WINDOW:]]
            said = json.dumps(
                [
                    [line.model_dump(mode="json", by_alias=True) for line in lines]
                    for lines in (kept, evaluations[:1])
                ]
            )
        told, first = json.loads(self.run.ranks.from_first(said))
        self.guard.remember(
            [Metrics.model_validate(line) for line in told],
            [EvaluationLine.model_validate(line) for line in first],
        )

    def _count_evaluations(self) -> None:
        own = self.run.policy.evaluations
        rows = torch.tensor(list(own.values()), dtype=torch.float64)
        self.run.ranks.sum_([rows])
        self.evaluations = dict(zip(own, map(int, rows.tolist()), strict=True))

    def _images_of(self, epoch: int) -> int:
        algorithm = self.spec.algorithm
        groups = algorithm.prompts_per_epoch * algorithm.seeds_per_prompt
        return groups * self.run.exploration.plan(epoch).images_per_group

    def _evaluate(self) -> list[str]:
        """Draw, score and record; the guard's alarms about it."""
        with self.run.clock("evaluation"), self.run.tuning.values(self.run.ema.values):
            found = self.evaluator.run()
        self._count_evaluations()
        alarms = self.guard.evaluation(_evaluation_line(self.epochs_done, found, None))
        if not self.run.ranks.is_first:
            return alarms
        grid = None
        if self.spec.tracking.image_grids:
            grid = f"{layout.GRIDS}/epoch-{self.epochs_done:06d}.png"
            labels = [prompt.text for prompt in self.evaluator.prompts]
            write_grid(found.images_PM3HW, labels, self.record.folder / grid)
        line = _evaluation_line(self.epochs_done, found, grid)
        line = line.model_copy(update={"alarms": alarms})
        self.record.append(layout.EVALUATIONS, line)
        self.tracking.evaluation(line)
        log.info(
            "evaluation after %d epochs: reward %.4f",
            self.epochs_done,
            float(found.total.nanmean()),
        )
        return alarms

    def _save(self) -> None:
        """Commit on rank 0; the others wait, so that none runs ahead of a failed save."""
        with self.run.clock("checkpoint"):
            state = self._state()
            self.committed_uri = self._on_first(lambda: self._commit(state))
        self.committed = self.epochs_done
        # At once: whoever ends this process now still learns which checkpoint is the newest.
        self._publish()

    def _commit(self, state: State) -> str:
        folder = self.checkpoints.save(state, lambda folder: self._export(folder, state.average))
        self._store_record()
        return f"{self.checkpoints.store.uri}/{folder}"

    def _on_first(self, action: Callable[[], str]) -> str:
        """What ``action`` returns on rank 0, on every rank; its error is raised on every rank."""
        answer: dict[str, str | int] = {}
        if self.run.ranks.is_first:
            try:
                answer = {"value": action()}
            except TempFlowError as error:
                answer = {"code": int(error.exit_code), "message": str(error)}
        answer = json.loads(self.run.ranks.from_first(json.dumps(answer)))
        if "code" in answer:
            raise of_code(int(answer["code"]), str(answer["message"]))
        return str(answer["value"])

    def _export(self, folder: Path, average: dict[str, Tensor]) -> None:
        """The result people use is the average, as evaluated; with what is needed to load it."""
        config = self.spec.model_dump_json(by_alias=True, indent=1)
        (folder / layout.CONFIG).write_text(config, encoding="utf-8")
        self.run.tuning.export(folder, average)

    def _state(self) -> State:
        """On rank 0; the others ask with it, as it takes all of them to make parts whole."""
        names, first = list(self.run.tuning.parameters()), self.run.ranks.is_first
        return State(
            epochs_done=self.epochs_done,
            updates_done=self.run.updates_done,
            trained=sharding.gathered(self.run.tuning.parameters(), keep=first),
            average=sharding.gathered(self.run.ema.values, keep=first),
            optimizer=checkpoint.optimizer_tensors(self.run.optimizer, names, keep=first),
            totals=self._totals(),
        )

    def _totals(self) -> dict[str, float]:
        """Images, evaluations and seconds of the whole run, over all its processes."""
        now_ = {
            "images": float(self.images),
            ROLLBACKS: float(self.rolled_back),
            **{f"evaluations.{k}": float(v) for k, v in self.evaluations.items()},
            **{f"seconds.{k}": v for k, v in self.run.clock.seconds.items()},
        }
        return {k: self.earlier.get(k, 0.0) + now_.get(k, 0.0) for k in self.earlier | now_}

    def _store_record(self) -> None:
        """Copy the record beside the checkpoints where they are kept elsewhere."""
        root = self.record.folder / layout.RECORD
        if self._stored_in_place():
            return
        for file in sorted(root.rglob("*")):
            if file.is_file() and not file.name.endswith(".partial"):
                self.checkpoints.store.put(
                    file, f"{layout.RECORD}/{file.relative_to(root).as_posix()}"
                )

    def _stored_in_place(self) -> bool:
        return Path(self.checkpoints.store.uri) == self.record.folder.absolute()

    def _resume(self) -> None:
        """Continue from the last complete checkpoint, if there is one.

        Rank 0 chooses for all: two ranks need not see the same listing.
        """
        folder = self._on_first(self._choose)
        if folder:
            self._restore(self.checkpoints.load(folder))
            self.committed = self.epochs_done
            self.committed_uri = f"{self.checkpoints.store.uri}/{folder}"
            log.info("continues after %d epochs, from %s", self.epochs_done, self.committed_uri)
        if self.run.ranks.is_first:
            self._fetch_record()
            # A run that has no epoch yet evaluates the base model again, too.
            self.record.cut_back(self.epochs_done or -1)
        self._set_learning_rate()
        self._remind_guard()

    def _choose(self) -> str:
        self._check_same_run()
        return self.checkpoints.newest_sound() or ""

    def _restore(self, state: State) -> None:
        self.run.tuning.assign(state.trained)
        for name, value in state.average.items():
            average = self.run.ema.values[name]
            average.copy_(sharding.like(value, average))
        names = list(self.run.tuning.parameters())
        checkpoint.restore_optimizer(self.run.optimizer, names, state.optimizer)
        self.epochs_done, self.run.updates_done = state.epochs_done, state.updates_done
        self.earlier = dict(state.totals)

    def _check_same_run(self) -> None:
        """Compare with the job that this run started as, and store it if it is the first."""
        store, local = self.checkpoints.store, self.checkpoints.staging / "stored-run.json"
        own = self.spec.model_dump_json(by_alias=True, indent=1).encode()
        if store.create(layout.RUN_FILE, own):
            return
        store.get(layout.RUN_FILE, local)
        changed = changed_fields(JobSpec.model_validate_json(local.read_bytes()), self.spec)
        fixed = [p for p in changed if mutability_of(p) is Mutability.IMMUTABLE]
        if fixed:
            raise ConfigChanged(
                f"the run at {store.uri} was started with other values of {', '.join(fixed)}; "
                "these decide what is learned: restore them, or give the job another name"
            )
        if changed:
            log.info("continues with new values of %s", ", ".join(changed))

    def _fetch_record(self) -> None:
        """On a new machine the record so far is in the store only."""
        if self._stored_in_place() or (self.record.folder / layout.METRICS).is_file():
            return
        for key in self.checkpoints.store.find(layout.RECORD):
            self.checkpoints.store.get(key, self.record.folder / key)

    def _finish(self) -> None:
        if self.run.ranks.is_first:
            lines = self.record.lines(layout.EVALUATIONS, EvaluationLine)
            summary = summarise(lines, self._totals(), self.epochs_done, str(self.committed_uri))
            self.record.write(layout.SUMMARY, summary.model_dump_json(by_alias=True, indent=1))
            self.tracking.end()  # what is stored is whole
            self._store_record()
        self._on_phase("done")

    def _on_phase(self, phase: str) -> None:
        if self.run.ranks.is_first:
            progress = self._progress(phase)
            self.record.progress(progress)
            self.announce(progress)

    def _publish(self) -> None:
        """Write the record of the last commit once more, for readers that come later."""
        self._on_phase("checkpoint")

    def _progress(self, phase: str) -> Progress:
        epochs = self.spec.algorithm.epochs
        last = self.last
        epoch_seconds = last.images / last.images_per_second if last else None
        left = epochs - self.epochs_done
        return Progress.model_validate(
            {
                "epoch": self.epochs_done,
                "epochs": epochs,
                "phase": phase,
                "attempt": self.checkpoints.attempt,
                "runId": self.run_id,
                "reward": last.reward if last else None,
                "imagesPerSecond": last.images_per_second if last else None,
                "alarms": [alarm[:1024] for alarm in self.alarms[:16]],
                "rollbacks": self.rollbacks,
                "etaSeconds": epoch_seconds * left if epoch_seconds else None,
                "checkpointEpoch": self.committed,
                "checkpointUri": self.committed_uri,
                "time": now(),
            }
        )


def _evaluation_line(epoch: int, found: Evaluation, grid: str | None) -> EvaluationLine:
    spreads = {
        name: Spread(**_moments(values))
        for name, values in found.scores.items()
        if bool(values.isfinite().any())
    }
    total = _moments(found.total)
    return EvaluationLine(
        epoch=epoch,
        time=now(),
        reward=total["mean"],
        reward_std=total["std"],
        rewards=spreads,
        missing_scores={name: int(v.isnan().sum()) for name, v in found.scores.items()},
        diversity=found.diversity,
        images=len(found.total),
        grid=grid,
    )


def _moments(values: Tensor) -> dict[str, float]:
    """Of the scores that are there."""
    there = values[values.isfinite()]
    return {"mean": float(there.mean()), "std": float(there.std(correction=0))}
