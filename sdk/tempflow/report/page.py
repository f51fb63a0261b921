"""The page: figures, curves, pictures and the configuration of a run, as one HTML document."""

from base64 import b64encode
from collections.abc import Callable, Sequence

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from tempflow.report import faults
from tempflow.report.charts import Line, chart
from tempflow.report.gather import RunRecord
from tempflow.wording import duration, number, size
from tempflow_api.record import Metrics

_Value = Callable[[Metrics], float]

# One chart a row: its title, and the label and value of each of its curves.
_CHARTS: tuple[tuple[str, tuple[tuple[str, _Value], ...]], ...] = (
    ("Divergence from the model before training", (("kl", lambda m: m.kl),)),
    ("Gradient norm before clipping", (("gradNorm", lambda m: m.grad_norm),)),
    (
        "Shares: clipped ratios, groups that teach nothing",
        (
            ("ratioClippedShare", lambda m: m.ratio_clipped_share),
            ("advantageZeroShare", lambda m: m.advantage_zero_share),
        ),
    ),
    (
        "Drift of the probability ratio, mean |ratio - 1|",
        (("ratioDrift", lambda m: m.ratio_drift),),
    ),
    (
        "Seconds an epoch, by phase",
        (
            ("rollout", lambda m: m.seconds.rollout),
            ("scoring", lambda m: m.seconds.scoring),
            ("update", lambda m: m.seconds.update),
        ),
    ),
    ("Images a second", (("imagesPerSecond", lambda m: m.images_per_second),)),
)


def page(record: RunRecord) -> str:
    """The document; it refers to nothing outside itself and holds no script."""
    environment = Environment(
        loader=PackageLoader("tempflow.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        record=record,
        state=_state(record),
        tiles=_tiles(record),
        charts=[svg for svg in _charts(record) if svg],
        always_zero=_always_zero(record.metrics),
        grids=[(grid.epoch, b64encode(grid.png).decode()) for grid in record.grids],
        steps=[
            (step.step, step.attempt, step.manifest.time if step.manifest else "-", size(step.size))
            for step in reversed(record.steps)
        ],
        configuration=_configuration(record),
        starts=faults.starts(record),
        alarms=faults.alarms(record),
        missing=faults.missing_scores(record),
        left_out=faults.groups_left_out(record),
        cost=faults.cost_of_saves(record.saves),
        failed=faults.failed_saves(record.saves),
        self_test=faults.self_test(record),
    )


def _state(record: RunRecord) -> str:
    done = record.metrics[-1].epoch if record.metrics else 0
    planned = record.spec.algorithm.epochs if record.spec else None
    if record.summary and record.summary.epochs >= (planned or 0):
        return f"finished after {done} epochs"
    return f"{done} of {planned} epochs" if planned else f"{done} epochs"


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """Label, figure and its remark."""
    tiles = []
    if record.evaluations:
        first, last = record.evaluations[0], record.evaluations[-1]
        tiles.append(
            (
                "reward at evaluation",
                f"{number(first.reward)} → {number(last.reward)}",
                f"of {last.images} images, epochs {first.epoch} to {last.epoch}",
            )
        )
        if first.diversity is not None and last.diversity is not None:
            tiles.append(
                (
                    "diversity within a prompt",
                    f"{number(first.diversity)} → {number(last.diversity)}",
                    "mean distance of two images; a fall is a sign of collapse",
                )
            )
    if record.metrics:
        images = sum(line.images for line in record.metrics)
        seconds = sum(line.images / max(line.images_per_second, 1e-9) for line in record.metrics)
        tiles.append(
            ("images scored", f"{images:,}", f"{number(images / max(seconds, 1e-9))} a second")
        )
        tiles.append(("training time", duration(seconds), "without evaluations and checkpoints"))
    if record.summary:
        tiles.append(
            ("peak memory", size(record.summary.peak_memory_bytes), "of the largest process")
        )
    return tiles + _trouble(record)


def _trouble(record: RunRecord) -> list[tuple[str, str, str]]:
    """Tiles that a run without any does not have."""
    tiles = []
    if len(record.claims) > 1:
        tiles.append(
            ("starts", str(len(record.claims)), "the run was interrupted and went on each time")
        )
    said, back = len(faults.alarms(record)), faults.rollbacks(record)
    if said or back:
        tiles.append(("alarms", str(said), f"of the guard; rollbacks: {back}"))
    failed = len(faults.failed_saves(record.saves))
    if failed:
        tiles.append(("failed saves", str(failed), f"of {len(record.saves)}"))
    return tiles


def _charts(record: RunRecord) -> list[str]:
    zero = _always_zero(record.metrics)
    return [_reward_chart(record), _rewards_chart(record), _diversity_chart(record)] + [
        chart(
            title,
            [
                Line(label, [(m.epoch, value(m)) for m in record.metrics])
                for label, value in curves
                if label not in zero
            ],
        )
        for title, curves in _CHARTS
    ]


def _always_zero(metrics: Sequence[Metrics]) -> list[str]:
    """Curves that are told in a sentence, because a flat line tells no more."""
    return [
        label
        for _, curves in _CHARTS
        for label, value in curves
        if metrics and not any(value(line) for line in metrics)
    ]


def _reward_chart(record: RunRecord) -> str:
    evaluated = Line(
        "at evaluation, fixed noise (band: standard deviation)",
        [(one.epoch, one.reward) for one in record.evaluations],
        [one.reward_std for one in record.evaluations],
    )
    drawn = Line("while training", [(m.epoch, m.reward) for m in record.metrics], faint=True)
    return chart("Reward", [evaluated, drawn])


def _rewards_chart(record: RunRecord) -> str:
    names: Sequence[str] = list(record.evaluations[-1].rewards) if record.evaluations else []
    held_out = (
        {term.name for term in record.spec.rewards if term.weight == 0} if record.spec else set()
    )
    return chart(
        "Every reward at evaluation, raw scores",
        [
            Line(
                f"{name} (only watched)" if name in held_out else name,
                [
                    (one.epoch, one.rewards[name].mean)
                    for one in record.evaluations
                    if name in one.rewards
                ],
            )
            for name in names
        ],
    )


def _diversity_chart(record: RunRecord) -> str:
    points = [(one.epoch, one.diversity) for one in record.evaluations if one.diversity is not None]
    return chart("Diversity within a prompt", [Line("diversity", points)])


def _configuration(record: RunRecord) -> str:
    if record.spec is None:
        return ""
    values = record.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
