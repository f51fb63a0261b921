"""A run as people see it: live in a terminal, a line an epoch in a pipe, a summary at its end."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tempflow.local import LOG_FILE, Outcome, Watcher
from tempflow.record import Record
from tempflow.wording import duration, number, size, sparkline, spread
from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ExitCode
from tempflow_api.record import Evaluation, Metrics, Summary
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import TempFlowGRPOJob

_SPARKLINE_WIDTH = 40


def watcher_for(console: Console, *, plain: bool) -> Watcher:
    """The live view where there is a terminal, plain lines elsewhere or if asked for."""
    return PlainWatcher(console) if plain or not console.is_terminal else LiveWatcher(console)


def say(console: Console, text: str) -> None:
    """A line as it is: no markup, no colours, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)


class PlainWatcher:
    """One line an event."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._job: TempFlowGRPOJob | None = None

    def began(self, job: TempFlowGRPOJob, folder: Path, earlier: Sequence[Metrics]) -> None:
        self._job = job
        say(self._console, opening(job, folder, earlier))

    def progressed(self, progress: Progress) -> None:
        kept = progress.checkpoint_epoch
        # The first record tells of the checkpoint that the run continues from.
        if self._progress and kept is not None and kept != self._progress.checkpoint_epoch:
            say(self._console, f"checkpoint after epoch {kept} is complete")
        self._progress = progress

    def trained(self, metrics: Metrics, progress: Progress | None) -> None:
        say(self._console, epoch_line(metrics, self._epochs, progress))

    def evaluated(self, evaluation: Evaluation) -> None:
        say(self._console, evaluation_line(evaluation))

    def notice(self, text: str) -> None:
        say(self._console, text)

    def ended(self) -> None:
        pass

    @property
    def _epochs(self) -> int:
        return self._job.spec.algorithm.epochs if self._job else 0


class LiveWatcher:
    """A view that is redrawn in place and leaves no trace but notices and evaluations."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._epochs = 0
        self._progress: Progress | None = None
        self._metrics: list[Metrics] = []
        self._live = Live(
            console=console, get_renderable=self._view, refresh_per_second=4, transient=True
        )

    def began(self, job: TempFlowGRPOJob, folder: Path, earlier: Sequence[Metrics]) -> None:
        self._name, self._epochs = job.metadata.name, job.spec.algorithm.epochs
        self._metrics = list(earlier)
        say(self._console, opening(job, folder, earlier))
        self._live.start()

    def progressed(self, progress: Progress) -> None:
        self._progress = progress

    def trained(self, metrics: Metrics, progress: Progress | None) -> None:
        self._metrics.append(metrics)

    def evaluated(self, evaluation: Evaluation) -> None:
        say(self._console, evaluation_line(evaluation))

    def notice(self, text: str) -> None:
        self._console.print(Text(text, style="yellow"))

    def ended(self) -> None:
        self._live.stop()

    def _view(self) -> RenderableType:
        rewards = [metrics.reward for metrics in self._metrics]
        return live_view(self._name, self._epochs, self._progress, rewards)


def live_view(
    name: str, epochs: int, progress: Progress | None, rewards: Sequence[float]
) -> RenderableType:
    """Two lines: how far the run is, and where the reward goes."""
    done = progress.epoch if progress else 0
    facts = [f"{done}/{epochs}", progress.phase if progress else "starting"]
    if progress and progress.images_per_second is not None:
        facts.append(f"{progress.images_per_second:.0f} images/s")
    if progress and progress.eta_seconds is not None:
        facts.append(f"{duration(progress.eta_seconds)} left")
    grid = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=epochs, completed=done, width=_SPARKLINE_WIDTH)
    grid.add_row(Text(name, style="bold"), bar, Text("  ".join(facts)))
    if rewards:
        curve = Text(sparkline(rewards, _SPARKLINE_WIDTH), style="cyan")
        last = progress.reward if progress else None
        grid.add_row(Text("reward"), curve, Text(number(rewards[-1] if last is None else last)))
    return grid


def opening(job: TempFlowGRPOJob, folder: Path, earlier: Sequence[Metrics]) -> str:
    """What is about to happen, and where."""
    done = f", continuing after epoch {earlier[-1].epoch}" if earlier else ""
    return (
        f"{job.metadata.name}: {job.spec.algorithm.epochs} epochs on "
        f"{job.spec.compute.device}{done}; log in {folder / LOG_FILE}"
    )


def epoch_line(metrics: Metrics, epochs: int, progress: Progress | None) -> str:
    """One epoch: reward and its spread, speed, time left."""
    width = len(str(epochs))
    line = (
        f"epoch {metrics.epoch:>{width}}/{epochs}  "
        f"reward {number(metrics.reward)} ± {number(metrics.reward_std)}"
    )
    line += f"  {metrics.images_per_second:.0f} images/s"
    if progress and progress.eta_seconds is not None:
        line += f"  {duration(progress.eta_seconds)} left"
    return line


def evaluation_line(evaluation: Evaluation) -> str:
    """One evaluation: every reward, and how different the images of a prompt are."""
    figures = [f"{name} {number(value.mean)}" for name, value in evaluation.rewards.items()]
    if evaluation.diversity is not None:
        figures.append(f"diversity {number(evaluation.diversity)}")
    line = f"evaluation after epoch {evaluation.epoch}: reward {number(evaluation.reward)}"
    return f"{line} ({', '.join(figures)})" if figures else line


def summary_lines(job: TempFlowGRPOJob, summary: Summary, folder: Path) -> list[str]:
    """What the run did, where the result lies, and the next command."""
    name, seconds = job.metadata.name, summary.seconds
    before, after = spread(summary.reward_before), spread(summary.reward_after)
    rows = [("reward", f"{before} -> {after}")]
    held_out = {term.name for term in job.spec.rewards if term.weight == 0}
    for reward, change in summary.rewards.items():
        note = ", held out" if reward in held_out else ""
        rows.append((f"  {reward}{note}", f"{number(change.before)} -> {number(change.after)}"))
    if summary.diversity:
        change = summary.diversity
        rows.append(("diversity", f"{number(change.before)} -> {number(change.after)}"))
    phases = ("rollout", "scoring", "update", "evaluation", "checkpoint")
    spent = ", ".join(f"{phase} {duration(getattr(seconds, phase))}" for phase in phases)
    rows += [
        ("work", f"{summary.evaluations:,} network evaluations, {summary.images:,} images scored"),
        ("time", f"{duration(seconds.total)} in phases: {spent}"),
    ]
    rows.append(("peak memory", f"{size(summary.peak_memory_bytes)}, of the largest process"))
    rows.append(("result", summary.result))
    if (folder / layout.GRIDS).is_dir():
        rows.append(("pictures", str(folder / layout.GRIDS)))
    width = max(len(label) for label, _ in rows)
    lines = [f"{name}: done, {summary.epochs} epochs"]
    lines += [f"  {label:<{width}}  {value}" for label, value in rows]
    return [*lines, f"next: {next_command(job, summary, folder)}"]


def next_command(job: TempFlowGRPOJob, summary: Summary, folder: Path) -> str:
    """The command that draws with the result of a run, or first gets it here."""
    if summary.result.startswith("s3://"):
        run = summary.result.partition(f"/{layout.CHECKPOINTS}/")[0]
        endpoint = job.spec.checkpoint.endpoint_url
        options = ["--endpoint-url", endpoint] if endpoint else []
        return shlex.join(["tempflow", "pull", run, *options])
    if job.spec.checkpoint.uri is not None:
        folder = Path(summary.result)
    prompt = job.spec.data.prompts[0] if job.spec.data.prompts else "YOUR PROMPT"
    words = ["tempflow", "sample", str(folder), "--prompt", prompt, "--out", "grid.png"]
    return shlex.join(words)


def ending(outcome: Outcome, again: str) -> list[str]:
    """What to say about a run that is not done; ``again`` is the command that continues it."""
    if outcome.problem:
        return [f"error: {outcome.problem}", f"log: {outcome.log}"]
    if outcome.code == ExitCode.DONE:
        return [f"done; the run left no {outcome.folder / layout.SUMMARY}"]
    progress = Record(outcome.folder).progress()
    kept = progress.checkpoint_epoch if progress else None
    state = f"the checkpoint after epoch {kept} is kept" if kept else "there is no checkpoint yet"
    return [f"stopped: {state}; the same command continues: {again}"]
