"""What went wrong in a run and what came of it: rows for the page, worked out of the record."""

from collections.abc import Sequence

from tempflow.report.gather import RunRecord
from tempflow.wording import number, size
from tempflow_api import checkpoint_layout as layout
from tempflow_api.record import Save

Row = tuple[str, ...]


def starts(record: RunRecord) -> list[Row]:
    """Attempt, start of it, time and what it continued from: one row a claim of the run."""
    return [
        (
            str(claim.attempt),
            str(claim.incarnation),
            claim.time,
            (claim.resumed_from or "nothing: from the beginning") + _skipped(claim),
        )
        for claim in record.claims
    ]


def _skipped(claim: layout.Entry) -> str:
    return f", as {', '.join(claim.skipped)} is damaged" if claim.skipped else ""


def alarms(record: RunRecord) -> list[Row]:
    """Epoch, where it was noticed, and what the guard said."""
    found = [(line.epoch, "training", said) for line in record.metrics for said in line.alarms]
    found += [(one.epoch, "evaluation", said) for one in record.evaluations for said in one.alarms]
    return [(str(epoch), where, said) for epoch, where, said in sorted(found)]


def rollbacks(record: RunRecord) -> int:
    """Times that the run went back to a checkpoint on its own."""
    return max((line.rollbacks for line in record.metrics), default=0)


def missing_scores(record: RunRecord) -> list[Row]:
    """Reward, images without its score, epochs with such images, groups left out for it."""
    names = sorted({name for line in record.metrics for name in line.missing_scores})
    images = sum(line.images for line in record.metrics)
    rows: list[Row] = []
    for name in names:
        counts = [line.missing_scores.get(name, 0) for line in record.metrics]
        epochs = sum(count > 0 for count in counts)
        rows.append((name, f"{sum(counts):,} of {images:,}", str(epochs)))
    return rows


def groups_left_out(record: RunRecord) -> int:
    """(group, step) pairs that taught nothing for want of a score."""
    return sum(line.groups_left_out for line in record.metrics)


def cost_of_saves(saves: Sequence[Save]) -> str:
    """One sentence; empty in a run that has not saved yet."""
    stored = [save for save in saves if save.error is None]
    if not saves:
        return ""
    failed = len(saves) - len(stored)
    stall = sum(save.stall_seconds for save in saves)
    told = f"{len(stored)} saves stored, {failed} failed; training waited {number(stall)} s in all"
    if not stored:
        return told
    send = sum(save.send_seconds for save in stored) / len(stored)
    mean = sum(save.bytes for save in stored) // len(stored)
    return f"{told}. One takes {number(send)} s beside it for {size(mean)}"


def failed_saves(saves: Sequence[Save]) -> list[Row]:
    """Epoch, time and reason."""
    return [(str(save.epoch), save.time, save.error) for save in saves if save.error is not None]


def self_test(record: RunRecord) -> list[Row]:
    """Figure and value; empty where there was none."""
    found = record.self_test
    if found is None:
        return []
    reward = "-" if found.reward is None else number(found.reward)
    walked = "-" if found.rollout_difference is None else number(found.rollout_difference)
    return [
        ("device", f"{found.device}, {found.precision}"),
        ("trained parameters", f"{found.trained_parameters:,}"),
        ("tensors that get a gradient", str(found.tensors_with_gradient)),
        ("of these, changed by one step", str(found.tensors_changed)),
        ("rollout and update differ by", walked),
        ("calls as full as the rollout's differ by", number(found.full_call_difference)),
        ("a row alone differs by", number(found.one_row_difference)),
        ("which may be", number(found.bound)),
        ("reward of the image drawn", reward),
        ("took", f"{number(found.seconds)} s"),
    ]
