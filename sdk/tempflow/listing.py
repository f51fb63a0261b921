"""Checkpoints as people and programs see them."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tempflow.checkpoints import Step
from tempflow.wording import columns, size


def checkpoints_as(output: str, steps: Sequence[Step], uri: str) -> list[str]:
    """Lines of ``tempflow checkpoints list``."""
    if output == "json":
        return [json.dumps([_as_object(step) for step in steps], indent=2)]
    if not steps:
        return [f"no complete checkpoint at {uri}"]
    rows = [["STEP", "ATTEMPT", "TIME", "SIZE", "RESULT", "FOLDER"]]
    for step in steps:
        time = step.manifest.time if step.manifest else "-"
        result = step.result or ("-" if step.manifest else "damaged")
        rows.append([str(step.step), str(step.attempt), time, size(step.size), result, step.folder])
    return columns(rows)


def _as_object(step: Step) -> dict[str, object]:
    return {
        "step": step.step,
        "attempt": step.attempt,
        "folder": step.folder,
        "time": step.manifest.time if step.manifest else None,
        "size": step.size,
        "result": step.result or None,
        "damaged": step.manifest is None,
    }


@contextmanager
def transfer(console: Console, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar that follows a download; nothing where there is no terminal."""
    bar = Progress(
        TextColumn("pulling"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("pulling", total=total)
        yield lambda done, _total: bar.update(task, completed=done)
