"""A run from start to end: epochs, evaluations, checkpoints, and the record of them."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import (
    Fenced,
    ModelUnavailable,
    Preempted,
    TempFlowError,
    TrainingCollapsed,
    TrainingDiverged,
)
from tempflow_api.record import Evaluation as EvaluationLine
from tempflow_api.record import Metrics
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import checkpoint, guard, selftest, sharding
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.evaluation import Evaluator, line_of, means_of, write_grid
from tempflow_trainer.guard import Guard
from tempflow_trainer.loop import Run, run_epoch
from tempflow_trainer.metrics import Record, now, say
from tempflow_trainer.origin import Origin, check_same_run
from tempflow_trainer.record_copy import RecordCopy
from tempflow_trainer.saving import Save, Saver
from tempflow_trainer.summary import peak_memory_bytes, summarise
from tempflow_trainer.tracking import Tracking

log = logging.getLogger(__name__)

ROLLBACKS = "guard.rollbacks"
"""Among the totals of a run."""
WAIT_SECONDS = 60.0
END_SECONDS = 25
"""Of the time between the request to stop and the kill: for the launcher and for what ends."""


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
    origin: Origin | None = None
    """What a run without a checkpoint of its own starts from."""
    older_runs: Callable[[], list[str]] = list
    """Where other runs of the same name lie."""
    run_id: str = ""
    """Which run's progress it is, for whoever asks at this address."""
    tracking: Tracking = field(default_factory=Tracking)
    on_save: Callable[[], None] = lambda: None
    """Called on every rank as a save begins."""
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
    last_evaluation: EvaluationLine | None = None
    saver: Saver = field(init=False)
    copy: RecordCopy = field(init=False)

    def __post_init__(self) -> None:
        """The guard and the saver of this run."""
        held_out = tuple(t.name for t in self.evaluator.reward.terms if t.weight == 0)
        self.guard = Guard(self.spec.guard, self.spec.algorithm.clip_range, held_out)
        self.copy = RecordCopy(self.record.folder, self.checkpoints.store, self.checkpoints.check)
        settings = self.spec.checkpoint
        self.saver = Saver(
            self.checkpoints,
            before=self.copy.send,  # what counts has its record, whenever this process ends
            wait_seconds=settings.max_wait_seconds,
            most_failures=settings.max_failed_saves,
            on_end=self._saved,
            write=lambda line: self.record.append(layout.SAVES, line),
            after=self.copy.send,
        )

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
        selftest.once(self.run, self.evaluator.reward, self.spec, self.record, self.copy.send)
        self.tracking.begin(self.epochs_done or -1)
        try:
            self._to_the_end()
        finally:
            self.tracking.end()

    def _to_the_end(self) -> None:
        try:
            if self.run.ranks.agreed(self._owes_evaluation):
                alarms = self._evaluate()
                if self.spec.guard.action == "rollback" and self.committed is None:
                    self._commit()  # there is always a place to go back to
                if alarms:
                    self._heed(alarms)
            while self.epochs_done < self.spec.algorithm.epochs:
                self._epoch()
        except Preempted:
            raise Preempted(self._commit_in_time()) from None
        except Fenced:
            raise
        except Exception:
            with suppress(TempFlowError):  # it does not concern a checkpoint that is on its way
                self.saver.settle(WAIT_SECONDS)
                if self.run.ranks.is_first:
                    self.copy.send()
            raise
        self._complete()
        self._finish()

    def _epoch(self) -> None:
        self.run.ranks.agreed(lambda: self.saver.settle(0))
        before = dict(self.run.clock.seconds)
        hidden = self.run.clock.hidden.get("scoring", 0.0)
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
                "scoringHiddenSeconds": self.run.clock.hidden.get("scoring", 0.0) - hidden,
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
            say(self.last, self.spec.algorithm.epochs)
        if self.alarms and self._heed(self.alarms):
            return
        if self._is_due(self.spec.evaluation.every_epochs) and (found := self._evaluate()):
            self.alarms = [*self.alarms, *found]
            if self._heed(found):
                return
        if self._is_due(self.spec.checkpoint.every_epochs):
            self._save()

    def _is_due(self, every_epochs: int) -> bool:
        """What happens after so many epochs each, and after the last one."""
        done = self.epochs_done
        return done == self.spec.algorithm.epochs or done % every_epochs == 0

    def _owes_evaluation(self) -> bool:
        """Of what it starts from: the start before may have been stopped in that evaluation."""
        seen = {line.epoch for line in self.record.lines(layout.EVALUATIONS, EvaluationLine)}
        due = not seen or self._is_due(self.spec.evaluation.every_epochs)
        return due and self.epochs_done not in seen

    def _heed(self, alarms: list[str]) -> bool:
        """Act upon alarms as ``spec.guard`` says; whether the run went back.

        Raises:
            TrainingCollapsed: it says stop, or the run went back often enough.
        """
        limits, said = self.spec.guard, "; ".join(alarms)
        if self.run.ranks.is_first:
            log.warning("alarm after %d epochs: %s", self.epochs_done, said)
        if limits.action == "warn":
            return False
        advice = "lower spec.optimizer.learningRate, or set spec.guard.action: warn to go on"
        if limits.action == "stop" or self.rollbacks >= limits.max_rollbacks:
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
        self._settle()
        found = self.run.ranks.on_first(lambda: self.checkpoints.newest_sound() or "")
        earlier = self.earlier
        self._restore(self.checkpoints.load(found), f"{self.checkpoints.store.uri}/{found}")
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
        self._commit()

    def _set_learning_rate(self) -> None:
        factor = self.spec.guard.learning_rate_factor**self.rollbacks
        for group in self.run.optimizer.param_groups:
            group["lr"] = self.spec.optimizer.learning_rate * factor

    def _remind_guard(self) -> None:
        """Tell the guard of every rank what rank 0 has recorded."""
        said = ""
        if self.run.ranks.is_first:
            said = guard.tell(
                self.record.lines(layout.METRICS, Metrics),
                self.record.lines(layout.EVALUATIONS, EvaluationLine),
            )
        self.guard.remember_told(self.run.ranks.from_first(said))

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
            found = self.evaluator.run(self.run.stop_requested)
        self._count_evaluations()
        alarms = self.guard.evaluation(line_of(self.epochs_done, found, None))
        if not self.run.ranks.is_first:
            return alarms
        grid = None
        if self.spec.tracking.image_grids:
            grid = f"{layout.GRIDS}/epoch-{self.epochs_done:06d}.png"
            labels = [prompt.text for prompt in self.evaluator.prompts]
            write_grid(found.images_PM3HW, labels, self.record.folder / grid)
        line = line_of(self.epochs_done, found, grid).model_copy(update={"alarms": alarms})
        self.last_evaluation = line
        self.record.append(layout.EVALUATIONS, line)
        self.tracking.evaluation(line)
        log.info("evaluation after %d epochs: reward %.4f", self.epochs_done, line.reward)
        return alarms

    def _save(self) -> None:
        """Begin to save on rank 0; all ranks learn of a failure that ends the run."""
        with self.run.clock("checkpoint"):
            start = time.perf_counter()
            if self.run.ranks.agreed(lambda: self.saver.ready(self.epochs_done)):
                self.on_save()  # not before: a start that was taken over stops there
                state = self._state()  # all ranks take part where weights are in parts
                if self.run.ranks.is_first:
                    line = self.last_evaluation
                    evaluated = line is not None and line.epoch == self.epochs_done
                    self.saver.begin(
                        state,
                        lambda folder: self._export(folder, state.average),
                        means_of(line) if line and evaluated else {},
                        stall_seconds=time.perf_counter() - start,
                    )

    def _saved(self, save: Save) -> None:
        if save.folder is not None:
            self.committed = save.step
            self.committed_uri = f"{self.checkpoints.store.uri}/{save.folder}"
            # At once: whoever ends this process now still learns which checkpoint is the newest.
            self._on_phase("checkpoint")

    def _is_committed(self) -> bool:
        return self.committed == self.epochs_done

    def _complete(self) -> None:
        """The last checkpoint is what the run was for: without it the run has failed."""
        self._settle()
        if not self.run.ranks.agreed(self._is_committed):
            self._commit()

    def _commit(self) -> None:
        """Save until it is stored; that ends, as failures are counted."""
        while True:
            self._save()
            self._settle()
            if self.run.ranks.agreed(lambda: self.saver.failures == 0):
                return

    def _settle(self) -> None:
        while not self.run.ranks.agreed(lambda: self.saver.settle(WAIT_SECONDS)):
            log.info("waits for a checkpoint to be stored")

    def _commit_in_time(self) -> str:
        """Commit what there is within the time that is left, and say so."""
        # The launcher's reserve, and some for the processes to end.
        left = self.spec.run_policy.termination_grace_period_seconds - END_SECONDS
        until = time.monotonic() + max(left, 1)

        def settled() -> bool:
            return self.saver.settle(max(until - time.monotonic(), 0))

        if self.run.ranks.agreed(settled) and not self.run.ranks.agreed(self._is_committed):
            self._save()
            self.run.ranks.agreed(settled)
        stopped = f"stopped after {self.epochs_done} of {self.spec.algorithm.epochs} epochs; "
        if self.run.ranks.agreed(self._is_committed):
            return f"{stopped}the state is committed at {self.committed_uri}"
        return (
            f"{stopped}they could not be stored in time, so the run continues from the checkpoint "
            "before; allow more with spec.runPolicy.terminationGracePeriodSeconds"
        )

    def _export(self, folder: Path, average: dict[str, Tensor]) -> None:
        """The result people use is the average, as evaluated; with what is needed to load it."""
        config = self.spec.model_dump_json(by_alias=True, indent=1)
        (folder / layout.CONFIG).write_text(config, encoding="utf-8")
        self.run.tuning.export(folder, average)

    def _state(self) -> State:
        """A copy in memory on rank 0; the others ask with it, as it takes all of them to make
        parts whole."""
        trained, average, optimizer = checkpoint.snapshot(
            self.run.tuning.parameters(),
            self.run.ema.values,
            self.run.optimizer,
            keep=self.run.ranks.is_first,
        )
        return State(
            epochs_done=self.epochs_done,
            updates_done=self.run.updates_done,
            trained=trained,
            average=average,
            optimizer=optimizer,
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

    def _resume(self) -> None:
        """Continue from the last complete checkpoint, if there is one.

        Rank 0 chooses for all: two ranks need not see the same listing.
        """
        own, _, other = self.run.ranks.on_first(self._choose).partition(" ")
        if own:
            self._restore(self.checkpoints.load(own), f"{self.checkpoints.store.uri}/{own}")
            self.committed = self.epochs_done
            self.committed_uri = f"{self.checkpoints.store.uri}/{own}"
            log.info("continues after %d epochs, from %s", self.epochs_done, self.committed_uri)
        elif other and self.origin is not None:
            uri = f"{self.origin.uri}/{other}"
            self._restore(self.origin.load(other), uri)
            self.checkpoints.parent = uri
            log.info(
                "starts at epoch %d with the %s of %s",
                self.epochs_done,
                "state" if self.origin.mode == "resume" else "weights",
                uri,
            )
        if self.run.ranks.is_first:
            self.copy.fetch()
            # A run that has committed no epoch yet evaluates what it starts from again, too.
            self.record.cut_back(self.committed or -1)
        self._set_learning_rate()
        self._remind_guard()

    def _choose(self) -> str:
        """The own folder to continue from, or a space and another run's folder; or neither."""
        check_same_run(self.checkpoints, self.spec)
        own = self.checkpoints.begin()
        if own:
            return own
        if self.origin is not None:
            return f" {self.origin.choose()}"
        for uri in self.older_runs():
            log.warning(
                "STARTS FROM ZERO, although an older run of this name has checkpoints at %s; to "
                "continue it, set spec.initFrom: {uri: %s, mode: resume}",
                uri,
                uri,
            )
        return ""

    def _restore(self, state: State, uri: str) -> None:
        try:
            self.run.tuning.assign(state.trained)
        except ValueError as error:
            raise ModelUnavailable(f"{uri} does not fit spec.model: {error}") from error
        for name, value in state.average.items():
            average = self.run.ema.values[name]
            average.copy_(sharding.like(value, average))
        names = list(self.run.tuning.parameters())
        if state.optimizer:
            checkpoint.restore_optimizer(self.run.optimizer, names, state.optimizer)
        self.epochs_done, self.run.updates_done = state.epochs_done, state.updates_done
        self.earlier = dict(state.totals)

    def _finish(self) -> None:
        memory = max(map(int, self.run.ranks.gather_rows(torch.tensor([peak_memory_bytes()]))))
        if self.run.ranks.is_first:
            lines = self.record.lines(layout.EVALUATIONS, EvaluationLine)
            result = str(self.committed_uri)
            summary = summarise(lines, self._totals(), self.epochs_done, result, memory)
            self.record.write(layout.SUMMARY, summary.model_dump_json(by_alias=True, indent=1))
            self.tracking.end()  # what is stored is whole
            self.copy.send()
        self._on_phase("done")

    def _on_phase(self, phase: str) -> None:
        if self.run.ranks.is_first:
            self.record.progress(progress := self._progress(phase))
            self.announce(progress)

    def _progress(self, phase: str) -> Progress:
        epochs = self.spec.algorithm.epochs
        last = self.last
        epoch_seconds = last.images / last.images_per_second if last else None
        ledger = self.checkpoints.ledger
        return Progress.model_validate(
            {
                "epoch": self.epochs_done,
                "epochs": epochs,
                "step": self.run.updates_done,
                "phase": phase,
                "attempt": self.checkpoints.attempt,
                "incarnation": ledger.newest.incarnation if ledger else 0,
                "runId": self.run_id,
                "reward": last.reward if last else None,
                "rewardCourse": self.record.reward_course(),
                "imagesPerSecond": last.images_per_second if last else None,
                "alarms": [alarm[:1024] for alarm in self.alarms[:16]],
                "rollbacks": self.rollbacks,
                "etaSeconds": epoch_seconds * (epochs - self.epochs_done)
                if epoch_seconds
                else None,
                "checkpointEpoch": self.committed,
                "checkpointUri": self.committed_uri,
                "failedSaves": self.saver.failures,
                "time": now(),
            }
        )
