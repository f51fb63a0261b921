"""Condition types and reasons of a job, and the summary derived from them."""

from collections.abc import Iterable, Sequence
from enum import StrEnum

from tempflow_api.status import Condition


class ConditionType(StrEnum):
    """All of them stand in ``status.conditions`` from the first reconcile on."""

    SUSPENDED = "Suspended"
    RUNNING = "Running"
    CHECKPOINTED = "Checkpointed"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    FINISHED = "Finished"


class Reason(StrEnum):
    """Why a condition is what it is; documented, part of the API."""

    PENDING = "Pending"
    PODS_STARTING = "PodsStarting"
    PODS_RUNNING = "PodsRunning"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    RESTARTING = "Restarting"
    SUSPENDED_BY_USER = "SuspendedByUser"
    NOT_SUSPENDED = "NotSuspended"
    COMMITTED = "Committed"
    NOT_YET = "NotYet"
    COMPLETED = "Completed"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SPEC_INVALID = "SpecInvalid"
    PERMANENT_FAILURE = "PermanentFailure"
    RESTARTS_EXHAUSTED = "RestartsExhausted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"


def set_condition(
    conditions: Sequence[Condition],
    kind: ConditionType,
    status: bool | None,
    reason: Reason,
    message: str = "",
    *,
    now: str,
    generation: int,
) -> list[Condition]:
    """``conditions`` with the one of type ``kind`` replaced or appended.

    ``None`` means Unknown. The transition time moves only when the status does.
    """
    word = {True: "True", False: "False", None: "Unknown"}[status]
    old = find(conditions, kind)
    changed = Condition.model_validate(
        {
            "type": kind.value,
            "status": word,
            "reason": reason.value,
            "message": message[:4096],
            "lastTransitionTime": (old.last_transition_time if old and old.status == word else now),
            "observedGeneration": generation,
        }
    )
    if old is None:
        return [*conditions, changed]
    return [changed if c.type == kind else c for c in conditions]


def find(conditions: Iterable[Condition], kind: ConditionType) -> Condition | None:
    """The condition of that type, if it is there."""
    return next((c for c in conditions if c.type == kind), None)


def is_true(conditions: Iterable[Condition], kind: ConditionType) -> bool:
    """Whether the condition of that type is there and ``True``."""
    condition = find(conditions, kind)
    return condition is not None and condition.status == "True"
