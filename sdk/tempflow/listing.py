"""Checkpoints as people and programs see them."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tempflow.checkpoints import Step
from tempflow.keeping import Plan
from tempflow.wording import columns, number, size
from tempflow_api import checkpoint_layout as layout


def checkpoints_as(
    output: str, steps: Sequence[Step], uri: str, pinned: frozenset[str] = frozenset()
) -> list[str]:
    """Lines of ``tempflow checkpoints list``."""
    if output == "json":
        return [json.dumps([as_object(step, pinned) for step in steps], indent=2)]
    if not steps:
        return [f"no complete checkpoint at {uri}"]
    rows = [["STEP", "ATTEMPT", "TIME", "SIZE", "RESULT", "FOLDER"]]
    for step in steps:
        time = step.manifest.time if step.manifest else "-"
        result = step.result or ("-" if step.manifest else "damaged")
        kept = " (pinned)" if step.folder in pinned else ""
        folder = f"{step.folder}{kept}"
        rows.append([str(step.step), str(step.attempt), time, size(step.size), result, folder])
    return columns(rows)


def checkpoint_as(output: str, step: Step, uri: str, pinned: frozenset[str]) -> list[str]:
    """Lines of ``tempflow checkpoints show``."""
    manifest = step.manifest
    if output == "json":
        found = as_object(step, pinned)
        whole = manifest.model_dump(mode="json", by_alias=True) if manifest else None
        return [json.dumps({**found, "manifest": whole}, indent=2)]
    rows = [
        ["checkpoint", f"{uri}/{layout.CHECKPOINTS}/{step.folder}"],
        ["epochs", str(step.step)],
        ["attempt", f"{step.attempt}, start {step.incarnation} of it"],
        ["pinned", "yes" if step.folder in pinned else "no"],
    ]
    if manifest is None:
        return columns([*rows, ["damaged", f"its {layout.MANIFEST} cannot be understood"]])
    rows += [
        ["committed", manifest.time],
        ["continues", manifest.parent or "nothing: it is the first"],
        ["processes", str(manifest.world_size)],
        ["written with", ", ".join(f"{k} {v}" for k, v in manifest.versions.items()) or "-"],
        ["size", size(step.size)],
        *([f"mean {name}", number(value)] for name, value in sorted(manifest.evaluation.items())),
    ]
    files = [[f.path, size(f.size), f.sha256[:16]] for f in manifest.files]
    return [*columns(rows), "", *columns([["FILE", "SIZE", "SHA-256"], *files])]


def plan_as(output: str, plan: Plan, *, done: bool) -> list[str]:
    """Lines of ``tempflow checkpoints prune``."""
    removed = [*(step.folder for step in plan.remove), *plan.left_behind]
    if output == "json":
        found = {
            "done": done,
            "kept": [step.folder for step in plan.keep],
            "removed": [step.folder for step in plan.remove],
            "leftBehind": list(plan.left_behind),
            "bytes": plan.size,
        }
        return [json.dumps(found, indent=2)]
    if not removed:
        return [f"nothing to prune: {len(plan.keep)} checkpoints are kept"]
    verb = "removed" if done else "would remove"
    told = [f"{verb} {folder}" for folder in removed]
    end = "" if done else "; nothing has changed, --yes does it"
    return [*told, f"{len(plan.keep)} are kept, {size(plan.size)} freed{end}"]


def as_object(step: Step, pinned: frozenset[str]) -> dict[str, object]:
    """A checkpoint for programs."""
    return {
        "step": step.step,
        "attempt": step.attempt,
        "folder": step.folder,
        "time": step.manifest.time if step.manifest else None,
        "size": step.size,
        "result": step.result or None,
        "damaged": step.manifest is None,
        "pinned": step.folder in pinned,
    }


@contextmanager
def transfer(console: Console, total: int, label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that follows bytes; nothing where there is no terminal."""
    bar = Progress(
        TextColumn(label),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda done, _total: bar.update(task, completed=done)
