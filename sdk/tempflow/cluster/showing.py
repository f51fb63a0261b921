"""Jobs, events and logs of a cluster as people and programs see them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import yaml
from rich.console import Console, RenderableType
from rich.live import Live

from tempflow.cluster.job import Event, Job, LogLine
from tempflow.render import live_view, say
from tempflow.wording import columns, duration, number, sparkline
from tempflow_api.conditions import ConditionType

_HIDDEN = ("managedFields",)


def objects(form: str, jobs: Sequence[Job], *, several: bool, with_namespace: bool = False) -> str:
    """For programs: as JSON or YAML the objects themselves, in a ``List`` where there may be
    several; as ``name`` a line each."""
    if form == "name":
        return "\n".join(f"{j.namespace}/{j.name}" if with_namespace else j.name for j in jobs)
    plain = [_without_bookkeeping(job) for job in jobs]
    whole: Any = {"apiVersion": "v1", "kind": "List", "items": plain} if several else plain[0]
    return _dumped(form, whole)


def job_and_events(form: str, job: Job, events: Sequence[Event]) -> str:
    """As JSON or YAML."""
    told = [asdict(event) for event in events]
    return _dumped(form, {"job": _without_bookkeeping(job), "events": told})


def _dumped(form: str, whole: Any) -> str:
    if form == "yaml":
        text: str = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
        return text.rstrip("\n")
    return json.dumps(whole, indent=2, ensure_ascii=False)


def _without_bookkeeping(job: Job) -> dict[str, Any]:
    kept = {key: value for key, value in job.raw["metadata"].items() if key not in _HIDDEN}
    return {**job.raw, "metadata": kept}


def table(jobs: Sequence[Job], *, with_namespace: bool, now: datetime | None = None) -> list[str]:
    """A line a job. Reads the plain objects, so that one written by a newer version is shown."""
    head = ["NAME", "PHASE", "NODES", "PROGRESS", "REWARD", "RESTARTS", "AGE"]
    rows = [["NAMESPACE", *head] if with_namespace else head]
    for job in jobs:
        status = job.raw.get("status") or {}
        progress = status.get("progress") or {}
        reward = progress.get("reward")
        restarts = status.get("restarts") or {}
        row = [
            job.name,
            job.phase or "-",
            str(job.raw["spec"].get("compute", {}).get("nodes", 1)),
            str(status.get("progressText") or "-"),
            "-" if reward is None else number(float(reward)),
            str(int(restarts.get("failures", 0)) + int(restarts.get("disruptions", 0))),
            age(job.created, now),
        ]
        rows.append([job.namespace, *row] if with_namespace else row)
    return columns(rows)


def age(timestamp: str, now: datetime | None = None) -> str:
    """Since then, in its two largest units: ``3d4h``, ``5m10s``."""
    then = datetime.fromisoformat(timestamp.replace("Z", "+00:00"))
    left = max(0, int(((now or datetime.now(UTC)) - then).total_seconds()))
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count}{unit}")
        elif parts:
            break
    return "".join(parts[:2])


def status_line(job: Job) -> str:
    """Where it is, in one line."""
    parts = [f"{job.name}: {job.phase or 'not seen by an operator yet'}"]
    progress = job.status.progress
    if progress is not None:
        parts.append(f"epoch {progress.epoch}/{progress.epochs}")
        if progress.reward is not None:
            parts.append(f"reward {number(progress.reward)}")
        if not job.finished and progress.eta_seconds is not None:
            parts.append(f"{duration(progress.eta_seconds)} left")
    if job.status.restarts.failures + job.status.restarts.disruptions:
        parts.append(f"attempt {job.status.attempt}")
    return f"{', '.join(parts)}{_reason(job)}"


def status_lines(job: Job) -> Iterator[str]:
    """Where it is, and how its reward got there."""
    yield status_line(job)
    progress = job.status.progress
    if progress is not None and len(progress.reward_course) > 1:
        course = progress.reward_course
        ends = f"{number(course[0])} -> {number(course[-1])}"
        yield f"  reward  {sparkline(course, len(course))}  {ends}"


def _reason(job: Job) -> str:
    return f" ({job.why})" if job.why and job.phase != "Running" else ""


def description(job: Job, events: Sequence[Event]) -> list[str]:
    """All that a person asks about a job."""
    spec, status = job.spec, job.status
    names = ", ".join(term.name for term in spec.rewards)
    facts = [
        ("namespace", job.namespace),
        ("created", f"{job.created} ({age(job.created)} ago)"),
        ("model", f"{spec.model.family}, {spec.model.source}"),
        ("rewards", names),
        ("compute", _compute(job)),
        ("store", f"{(spec.checkpoint.uri or '').rstrip('/')}/{job.run_folder}"),
    ]
    if status.checkpoint is not None:
        facts.append(("checkpoint", f"after epoch {status.checkpoint.epoch}"))
    lines = [status_line(job), *(f"  {label:<10}  {value}" for label, value in facts)]
    if status.conditions:
        rows = [["CONDITION", "STATUS", "SINCE", "REASON", "MESSAGE"]]
        for c in status.conditions:
            since = age(c.last_transition_time)
            rows.append([c.type, c.status, since, c.reason, c.message])
        lines += ["", *columns(rows)]
    if status.attempts:
        rows = [["ATTEMPT", "OUTCOME", "START", "END", "CAUSE"]]
        for a in status.attempts:
            start, end = a.start_time or "-", a.end_time or "-"
            rows.append([str(a.number), a.outcome, start, end, _cause(a.failure)])
        lines += ["", *columns(rows)]
    if events:
        lines += ["", *event_table(events)]
    return lines


def _compute(job: Job) -> str:
    compute = job.spec.compute
    each = f"{compute.processes_per_node} process(es) each" if compute.nodes > 1 else ""
    nodes = f"{compute.nodes} node(s)"
    return ", ".join(part for part in (compute.device, nodes, each, compute.image or "") if part)


def _cause(failure: Any) -> str:
    if failure is None:
        return ""
    code = "" if failure.exit_code is None else f"exit code {failure.exit_code}"
    return ", ".join(p for p in (failure.pod, code, failure.reason, failure.message) if p)


def event_table(events: Sequence[Event]) -> list[str]:
    rows = [["LAST SEEN", "TYPE", "REASON", "ABOUT", "NOTE"]]
    rows += [event_row(event) for event in events]
    return columns(rows)


def event_row(event: Event) -> list[str]:
    note = f"{event.note} (x{event.count})" if event.count > 1 else event.note
    return [event.time[:19] + "Z", event.type, event.reason, event.about, " ".join(note.split())]


def as_json_line(item: Event | LogLine) -> str:
    """One object a line, which a program can read as it comes."""
    plain = item._asdict() if isinstance(item, LogLine) else asdict(item)
    return json.dumps(plain, ensure_ascii=False)


def log_text(line: LogLine, *, prefix: bool, timestamps: bool) -> str:
    """A line; the prefix tells attempt and index of its pod."""
    parts = [line.time] if timestamps else []
    if prefix:
        parts.append(f"[{line.attempt}/{line.node_rank}]")
    return " ".join([*parts, line.text])


class PlainLook:
    """A line whenever something about a job is new."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def __enter__(self) -> "PlainLook":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, job: Job) -> None:
        line = status_line(job)
        # What is left is another number every time.
        key = line.partition(" left")[0].rpartition(", ")[0] if " left" in line else line
        if key != self._last:
            self._last = key
            say(self._console, line)


class LiveLook:
    """A bar and the course of the reward, redrawn in place; gone at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._job: Job | None = None
        self._phase = ""
        self._live = Live(
            console=console, get_renderable=self._view, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> "LiveLook":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, job: Job) -> None:
        self._job = job
        if job.phase not in ("Running", self._phase) and not job.finished:
            say(self._console, status_line(job))
        self._phase = job.phase

    def _view(self) -> RenderableType:
        job = self._job
        if job is None:
            return ""
        progress = job.status.progress
        course = progress.reward_course if progress is not None else []
        return live_view(job.name, job.spec.algorithm.epochs, progress, course)


def look(console: Console, *, plain: bool) -> PlainLook | LiveLook:
    """The live view where there is a terminal, plain lines elsewhere or if asked for."""
    return PlainLook(console) if plain or not console.is_terminal else LiveLook(console)


def ending(job: Job) -> Iterator[str]:
    """What a job that was waited for came to, and what to do with it."""
    yield status_line(job)
    if job.is_true(ConditionType.SUCCEEDED):
        yield f"next: tempflow pull job/{job.name} -n {job.namespace}"
