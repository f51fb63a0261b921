"""A run from start to end: epochs, evaluations, checkpoints, and the record of them."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ConfigChanged, Preempted, TempFlowError, of_code
from tempflow_api.record import Evaluation as EvaluationLine
from tempflow_api.record import Metrics, Spread
from tempflow_api.rules import Mutability, changed_fields, mutability_of
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import checkpoint, sharding
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.evaluation import Evaluation, Evaluator, write_grid
from tempflow_trainer.loop import Run, run_epoch
from tempflow_trainer.metrics import Record, now
from tempflow_trainer.summary import summarise

log = logging.getLogger(__name__)


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
    epochs_done: int = 0
    committed: int | None = None
    committed_uri: str | None = None
    images: int = 0
    evaluations: dict[str, int] = field(default_factory=dict)
    """Rows of the network by purpose, over all ranks, which need not have equal shares."""
    earlier: dict[str, float] = field(default_factory=dict)
    """Totals of the processes before this one."""
    last: Metrics | None = None

    def train(self) -> None:
        """Run what is left to do.

        Raises:
            Preempted: stopped on request; the state is committed.
        """
        self.run.clock.on_phase = self._on_phase
        self._resume()
        try:
            if self.epochs_done == 0:
                self._evaluate()
            while self.epochs_done < self.spec.algorithm.epochs:
                self._epoch()
        except Preempted:
            if self.committed != self.epochs_done:
                self._save()
            self._publish()
            raise Preempted(
                f"stopped after {self.epochs_done} of {self.spec.algorithm.epochs} epochs; the "
                f"state is committed at {self.committed_uri}"
            ) from None
        self._finish()

    def _epoch(self) -> None:
        before = dict(self.run.clock.seconds)
        evaluations = self.evaluations
        metrics = run_epoch(self.run, self.epochs_done)
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

    def _images_of(self, epoch: int) -> int:
        algorithm = self.spec.algorithm
        groups = algorithm.prompts_per_epoch * algorithm.seeds_per_prompt
        return groups * self.run.exploration.plan(epoch).images_per_group

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
        self.record.append(layout.EVALUATIONS, _evaluation_line(self.epochs_done, found, grid))
        log.info(
            "evaluation after %d epochs: reward %.4f",
            self.epochs_done,
            float(found.total.nanmean()),
        )

    def _save(self) -> None:
        """Commit on rank 0; the others wait, so that none runs ahead of a failed save."""
        with self.run.clock("checkpoint"):
            state = self._state()
            self.committed_uri = self._on_first(lambda: self._commit(state))
        self.committed = self.epochs_done

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


def _moments(values: Tensor) -> dict[str, float]:
    """Of the scores that are there."""
    there = values[values.isfinite()]
    return {"mean": float(there.mean()), "std": float(there.std(correction=0))}
