"""A run from start to end: epochs, evaluations, checkpoints, and the record of them."""

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ConfigChanged, ModelUnavailable, Preempted, TempFlowError, of_code
from tempflow_api.record import Evaluation as EvaluationLine
from tempflow_api.record import Metrics, Spread
from tempflow_api.record import Save as SaveLine
from tempflow_api.rules import Mutability, changed_fields, mutability_of
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import checkpoint, sharding
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.evaluation import Evaluation, Evaluator, write_grid
from tempflow_trainer.loop import Run, run_epoch
from tempflow_trainer.metrics import Record, now
from tempflow_trainer.origin import Origin
from tempflow_trainer.saving import Save, Saver
from tempflow_trainer.summary import summarise

log = logging.getLogger(__name__)

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
    epochs_done: int = 0
    committed: int | None = None
    committed_uri: str | None = None
    images: int = 0
    evaluations: dict[str, int] = field(default_factory=dict)
    """Rows of the network by purpose, over all ranks, which need not have equal shares."""
    earlier: dict[str, float] = field(default_factory=dict)
    """Totals of the processes before this one."""
    last: Metrics | None = None
    last_evaluation: EvaluationLine | None = None
    saver: Saver = field(init=False)
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Files of the record that the store has, by size and time of change."""

    def __post_init__(self) -> None:
        settings = self.spec.checkpoint
        self.saver = Saver(
            self.checkpoints,
            wait_seconds=settings.max_wait_seconds,
            most_failures=settings.max_failed_saves,
            on_end=self._saved,
            after=self._store_record,
        )

    def train(self) -> None:
        """Run what is left to do.

        Raises:
            Preempted: stopped on request; the state is committed.
        """
        self.run.clock.on_phase = self._on_phase
        self._resume()
        try:
            if self.epochs_done == 0 or self.committed is None:
                self._evaluate()
            while self.epochs_done < self.spec.algorithm.epochs:
                self._epoch()
        except Preempted:
            told = self._commit_in_time()
            raise Preempted(told) from None
        except Exception:
            # What ended the run does not concern a checkpoint that is on its way.
            with suppress(TempFlowError):
                self.saver.settle(WAIT_SECONDS)
            raise
        self._complete()
        self._finish()

    def _epoch(self) -> None:
        self._on_first(self._look_after_saves)
        before = dict(self.run.clock.seconds)
        evaluations = self.evaluations
        metrics = run_epoch(self.run, self.epochs_done)
        self.epochs_done += 1
        self._count_evaluations()
        images = self._images_per_epoch()
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
            }
        )
        if self.run.ranks.is_first:
            self.record.append(layout.METRICS, self.last)
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
            self._evaluate()
        if last or self.epochs_done % self.spec.checkpoint.every_epochs == 0:
            self._save()

    def _count_evaluations(self) -> None:
        own = self.run.policy.evaluations
        rows = torch.tensor(list(own.values()), dtype=torch.float64)
        self.run.ranks.sum_([rows])
        self.evaluations = dict(zip(own, map(int, rows.tolist()), strict=True))

    def _images_per_epoch(self) -> int:
        algorithm = self.spec.algorithm
        groups = algorithm.prompts_per_epoch * algorithm.seeds_per_prompt
        return groups * self.run.plan.images_per_group

    def _evaluate(self) -> None:
        with self.run.clock("evaluation"), self.run.tuning.values(self.run.ema.values):
            found = self.evaluator.run()
        self._count_evaluations()
        if not self.run.ranks.is_first:
            return
        grid = None
        if self.spec.tracking.image_grids:
            grid = f"{layout.GRIDS}/epoch-{self.epochs_done:06d}.png"
            labels = [prompt.text for prompt in self.evaluator.prompts]
            write_grid(found.images_PM3HW, labels, self.record.folder / grid)
        self.last_evaluation = _evaluation_line(self.epochs_done, found, grid)
        self.record.append(layout.EVALUATIONS, self.last_evaluation)
        log.info(
            "evaluation after %d epochs: reward %.4f",
            self.epochs_done,
            float(found.total.nanmean()),
        )

    def _save(self) -> None:
        """Begin to save on rank 0; all ranks learn of a failure that ends the run."""
        with self.run.clock("checkpoint"):
            start = time.perf_counter()
            if self._agreed(self.saver.ready):
                # All ranks take part where weights are in parts.
                state = self._state()
                if self.run.ranks.is_first:
                    line = self.last_evaluation
                    evaluated = line is not None and line.epoch == self.epochs_done
                    self.saver.begin(
                        state,
                        lambda folder: self._export(folder, state.average),
                        _figures(line) if line and evaluated else {},
                        stall_seconds=time.perf_counter() - start,
                    )

    def _look_after_saves(self) -> str:
        self.saver.settle(0)
        return ""

    def _saved(self, save: Save) -> None:
        if save.folder is not None:
            self.committed = save.step
            self.committed_uri = f"{self.checkpoints.store.uri}/{save.folder}"
            # At once: whoever ends this process now still learns which checkpoint is the newest.
            self._publish()
        self.record.append(
            layout.SAVES,
            SaveLine(
                epoch=save.step,
                time=now(),
                stall_seconds=save.stall_seconds,
                stage_seconds=save.stage_seconds,
                send_seconds=save.send_seconds,
                bytes=save.bytes,
                folder=save.folder,
                error=str(save.error) if save.error else None,
            ),
        )

    def _is_committed(self) -> bool:
        return self.committed == self.epochs_done

    def _complete(self) -> None:
        """The last checkpoint is what the run was for: without it the run has failed."""
        while not self._agreed(lambda: self.saver.settle(WAIT_SECONDS)):
            log.info("waits for the last checkpoint")
        while not self._agreed(self._is_committed):  # ends: failures are counted
            self._save()
            while not self._agreed(lambda: self.saver.settle(WAIT_SECONDS)):
                log.info("waits for the last checkpoint")

    def _commit_in_time(self) -> str:
        """Commit what there is within the time that is left, and say so."""
        # The launcher's reserve, and some for the processes to end.
        left = self.spec.run_policy.termination_grace_period_seconds - END_SECONDS
        until = time.monotonic() + max(left, 1)

        def settled() -> bool:
            return self.saver.settle(max(until - time.monotonic(), 0))

        if self._agreed(settled) and not self._agreed(self._is_committed):
            self._save()
            self._agreed(settled)
        stopped = f"stopped after {self.epochs_done} of {self.spec.algorithm.epochs} epochs; "
        if self._agreed(self._is_committed):
            return f"{stopped}the state is committed at {self.committed_uri}"
        return (
            f"{stopped}they could not be stored in time, so the run continues from the checkpoint "
            "before; allow more with spec.runPolicy.terminationGracePeriodSeconds"
        )

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

    def _agreed(self, question: Callable[[], bool]) -> bool:
        """Rank 0's answer, on every rank."""
        return self._on_first(lambda: "yes" if question() else "") == "yes"

    def _export(self, folder: Path, average: dict[str, Tensor]) -> None:
        """The result people use is the average, as evaluated; with what is needed to load it."""
        config = self.spec.model_dump_json(by_alias=True, indent=1)
        (folder / layout.CONFIG).write_text(config, encoding="utf-8")
        self.run.tuning.export(folder, average)

    def _state(self) -> State:
        """A copy in memory on rank 0; the others ask with it, as it takes all of them to make
        parts whole."""
        names, first = list(self.run.tuning.parameters()), self.run.ranks.is_first
        trained = sharding.gathered(self.run.tuning.parameters(), keep=first)
        average = sharding.gathered(self.run.ema.values, keep=first)
        return State(
            epochs_done=self.epochs_done,
            updates_done=self.run.updates_done,
            trained=checkpoint.host_copy(trained),
            average=checkpoint.host_copy(average),
            optimizer=checkpoint.optimizer_tensors(self.run.optimizer, names, keep=first),
            totals=self._totals(),
        )

    def _totals(self) -> dict[str, float]:
        """Images, evaluations and seconds of the whole run, over all its processes."""
        now_ = {
            "images": float(self.images),
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
            if not file.is_file() or file.name.endswith(".partial"):
                continue
            key = f"{layout.RECORD}/{file.relative_to(root).as_posix()}"
            status = file.stat()
            if self._sent.get(key) != (status.st_size, status.st_mtime_ns):
                self.checkpoints.store.put(file, key)
                self._sent[key] = (status.st_size, status.st_mtime_ns)

    def _stored_in_place(self) -> bool:
        return Path(self.checkpoints.store.uri) == self.record.folder.absolute()

    def _resume(self) -> None:
        """Continue from the last complete checkpoint, if there is one.

        Rank 0 chooses for all: two ranks need not see the same listing.
        """
        own, _, other = self._on_first(self._choose).partition(" ")
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
            self._fetch_record()
            # A run that has committed no epoch yet evaluates what it starts from again, too.
            self.record.cut_back(self.committed or -1)

    def _choose(self) -> str:
        """The own folder to continue from, or a space and another run's folder; or neither."""
        self._check_same_run()
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


def _figures(line: EvaluationLine) -> dict[str, float]:
    """Means by name, as a checkpoint's manifest has them."""
    found = {"reward": line.reward, **{name: s.mean for name, s in line.rewards.items()}}
    return {name: mean for name, mean in found.items() if math.isfinite(mean)}


def _moments(values: Tensor) -> dict[str, float]:
    """Of the scores that are there."""
    there = values[values.isfinite()]
    return {"mean": float(there.mean()), "std": float(there.std(correction=0))}
