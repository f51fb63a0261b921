"""Checkpoints that somebody wants kept, and those that nobody needs: pins and pruning.

Both are safe beside a run that is under way. A pin is an object of its own. What is pruned leaves
the ledger first, by an entry in the name of the run's owner, who goes on from it; see
``checkpoint_layout``.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from pydantic import ValidationError

from tempflow import checkpoints
from tempflow.checkpoints import Step, Store
from tempflow.refused import Refused
from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import StoreUnavailable
from tempflow_api.retention import Retention
from tempflow_api.storage import Checkpoint
from tempflow_api.v1alpha1 import JobSpec

LEAST_KEPT = 2
"""So that a damaged checkpoint has a predecessor."""
_MOST_RACES = 20


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def pin(store: Store, step: Step, reason: str = "") -> bool:
    """Keep a checkpoint whatever retention says; False where it was pinned already.

    Raises:
        StoreUnavailable: the run let go of it at that moment, or the store refuses.
    """
    content = layout.Pin(time=_now(), reason=reason).model_dump_json(by_alias=True).encode()
    key = layout.pin_key(step.folder)
    made = checkpoints.create(store, key, content)
    # The run may have looked for pins just before, and deleted it.
    if step.folder not in {one.folder for one in checkpoints.steps(store)}:
        checkpoints.delete(store, [key])
        raise StoreUnavailable(f"{step.folder} is gone: the run has just let go of it")
    return made


def unpin(store: Store, step: Step) -> bool:
    """Leave a checkpoint to retention again; False where it was not pinned."""
    was = step.folder in checkpoints.pinned(store)
    checkpoints.delete(store, [layout.pin_key(step.folder)])
    return was


def retention_of(store: Store, keep_last: int | None) -> Retention:
    """What the run's job says, as its newest checkpoint has it, or else as it was started; with
    ``keep_last`` in its place where given.

    Raises:
        Refused: neither says anything.
    """
    newest = [f"{layout.CHECKPOINTS}/{s.folder}/{layout.CONFIG}" for s in checkpoints.steps(store)]
    said = (_settings(store, key) for key in (*newest[-1:], layout.RUN_FILE))
    settings = next((found for found in said if found is not None), None)
    if settings is None:
        if keep_last is None:
            raise Refused(
                f"{store.uri}/{layout.RUN_FILE} does not say what is to be kept: say --keep-last N"
            )
        return Retention(keep_last)
    found = Retention.of(settings)
    return found if keep_last is None else replace(found, keep_last=keep_last)


def _settings(store: Store, key: str) -> Checkpoint | None:
    text = checkpoints.read(store, key)
    try:
        return JobSpec.model_validate_json(text).checkpoint if text else None
    except ValidationError:
        return None


@dataclass(frozen=True)
class Plan:
    """What pruning would do."""

    keep: list[Step]
    """Oldest first, as the next ones."""
    remove: list[Step]
    left_behind: dict[str, int]
    """Bytes by folder of what starts that were taken over left, which never counts."""

    @property
    def size(self) -> int:
        """Bytes that it frees."""
        return sum(step.size for step in self.remove) + sum(self.left_behind.values())


def plan(store: Store, retention: Retention) -> Plan:
    """Apply ``retention`` to what counts now. Pinned ones and the newest two are always kept."""
    entry = checkpoints.newest_entry(store)
    counting = checkpoints.steps(store)
    keep = _kept(counting, retention, checkpoints.pinned(store))
    return Plan(
        keep=[step for step in counting if step.folder in keep],
        remove=[step for step in counting if step.folder not in keep],
        left_behind=_left_behind(store, counting, entry),
    )


def _kept(counting: Sequence[Step], retention: Retention, pinned: frozenset[str]) -> set[str]:
    evaluations: Mapping[str, Mapping[str, float]] = {
        step.folder: step.manifest.evaluation for step in counting if step.manifest
    }
    newest_first = [
        folder for s in reversed(counting) if (folder := layout.parse_folder(s.folder)) is not None
    ]
    retention = replace(retention, keep_last=max(retention.keep_last, LEAST_KEPT))
    return {folder.name for folder in retention.kept(newest_first, evaluations, pinned)}


def _left_behind(
    store: Store, counting: Sequence[Step], entry: layout.Entry | None
) -> dict[str, int]:
    """Of starts before the owner's only: what the owner has not committed may be on its way."""
    if entry is None:
        return {}
    counts = {step.folder for step in counting} | set(entry.committed)
    return {
        name: sum(checkpoints.files_below(store, f"{layout.CHECKPOINTS}/{name}").values())
        for name in sorted(checkpoints.names(store, layout.CHECKPOINTS))
        if (folder := layout.parse_folder(name)) is not None
        and name not in counts
        and folder.writer < entry.owner
    }


def prune(store: Store, planned: Plan) -> Plan:
    """Do it, as far as it still holds; returns what was removed and kept.

    Raises:
        StoreUnavailable: the store refuses. What left the ledger is gone, files may remain.
    """
    removed = _let_go(store, {step.folder for step in planned.remove})
    for name in [*sorted(removed), *planned.left_behind]:
        checkpoints.delete_folder(store, f"{layout.CHECKPOINTS}/{name}")
    return Plan(
        keep=[*planned.keep, *(s for s in planned.remove if s.folder not in removed)],
        remove=[step for step in planned.remove if step.folder in removed],
        left_behind=planned.left_behind,
    )


def _let_go(store: Store, unwanted: set[str]) -> set[str]:
    """Take folders off the list of those that count, if they are not pinned meanwhile."""
    for _ in range(_MOST_RACES):
        unwanted = unwanted - checkpoints.pinned(store)
        entry = checkpoints.newest_entry(store)
        if entry is None or not unwanted:
            return unwanted
        # A run that went back may have dropped newer ones since: then others are the newest two.
        going = unwanted & set(entry.committed[LEAST_KEPT:])
        kept = [name for name in entry.committed if name not in going]
        if not going:
            return set()
        following = entry.model_copy(
            update={
                "number": entry.number + 1,
                "action": "prune",
                "nonce": uuid.uuid4().hex,
                "time": _now(),
                "resumed_from": None,
                "committed": kept,
            }
        )
        content = following.model_dump_json(by_alias=True, indent=1).encode()
        if checkpoints.create(store, layout.entry_key(following.number), content):
            return going
    raise StoreUnavailable(f"{store.uri}: {_MOST_RACES} saves of its run came between; try again")
