"""Condition types and reasons of a job, and the summary derived from them."""

from collections.abc import Iterable, Sequence
from enum import StrEnum

from tempflow_api.status import Condition, Phase


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
    QUEUED = "Queued"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_NOT_STARTED = "ContainerNotStarted"
    NAME_TAKEN = "NameTaken"
    REQUEST_REFUSED = "RequestRefused"
    STOPPING = "Stopping"
    RESTARTING = "Restarting"
    SUSPENDING = "Suspending"
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
    CANCELLED = "Cancelled"
    PRE_RUNNING_DEADLINE_EXCEEDED = "PreRunningDeadlineExceeded"
    STALLED = "Stalled"
    PREFLIGHT_FAILED = "PreflightFailed"
    REWARD_NOT_SERVED = "RewardNotServed"
    PREFLIGHT_RESTARTS_EXHAUSTED = "PreflightRestartsExhausted"


CONDITION_MEANINGS: dict[ConditionType, str] = {
    ConditionType.SUSPENDED: "True when `runPolicy.suspend` is set and every pod has ended.",
    ConditionType.RUNNING: "True while all pods of the current attempt run.",
    ConditionType.CHECKPOINTED: "True once a complete checkpoint is known.",
    ConditionType.SUCCEEDED: "True when all epochs are trained and the result is stored.",
    ConditionType.FAILED: "True when no further attempt will be made.",
    ConditionType.FINISHED: "True on either end, once no pod is left that may still run: what a "
    "script waits for.",
}

REASON_MEANINGS: dict[Reason, str] = {
    Reason.PENDING: "The operator has seen the job and started nothing yet.",
    Reason.PODS_STARTING: "Pods exist and do not all run yet.",
    Reason.PODS_RUNNING: "All pods of the attempt run.",
    Reason.UNSCHEDULABLE: "The scheduler finds no node for a pod.",
    Reason.QUEUED: "A queue holds the attempt back; it has not been admitted.",
    Reason.IMAGE_PULL_FAILED: "A node cannot pull the trainer's image.",
    Reason.CONTAINER_NOT_STARTED: "A node cannot create the container, for instance because the "
    "Secret of `compute.secretName` is missing.",
    Reason.NAME_TAKEN: "Somebody else's object has the name that the attempt needs.",
    Reason.REQUEST_REFUSED: "The API server refuses what the operator asks for; it tries again.",
    Reason.STOPPING: "Pods of an attempt that has ended are still stopping.",
    Reason.RESTARTING: "The attempt ended; the next one starts after a pause.",
    Reason.SUSPENDING: "Suspended by the user; pods write a last checkpoint and stop.",
    Reason.SUSPENDED_BY_USER: "`runPolicy.suspend` is true and no pod is left.",
    Reason.NOT_SUSPENDED: "`runPolicy.suspend` is false.",
    Reason.COMMITTED: "`status.checkpoint` names a complete checkpoint.",
    Reason.NOT_YET: "Not so far.",
    Reason.COMPLETED: "All epochs are trained.",
    Reason.SUCCEEDED: "The job ended well.",
    Reason.FAILED: "The job ended badly; the condition `Failed` says why.",
    Reason.SPEC_INVALID: "The job cannot run as it is written.",
    Reason.PERMANENT_FAILURE: "The trainer ended with an exit code after which a further attempt "
    "would end the same way.",
    Reason.RESTARTS_EXHAUSTED: "The attempt failed and `runPolicy.maxRestarts` are used up.",
    Reason.DEADLINE_EXCEEDED: "The job was active for `runPolicy.activeDeadlineSeconds`.",
    Reason.CANCELLED: "`runPolicy.cancel` is true.",
    Reason.PRE_RUNNING_DEADLINE_EXCEEDED: "The pods of an attempt did not all run within "
    "`runPolicy.preRunningDeadlineSeconds`.",
    Reason.STALLED: "Progress did not move for `runPolicy.stallTimeoutSeconds`; the attempt was "
    "ended and the next one starts after a pause.",
    Reason.PREFLIGHT_FAILED: "A check before training found a node, the network or the store "
    "unfit; the next attempt starts after a pause.",
    Reason.REWARD_NOT_SERVED: "The pods of a reward with `placement: service` end again and again, "
    "or cannot be created.",
    Reason.PREFLIGHT_RESTARTS_EXHAUSTED: "A check before training found a node, the network or the "
    "store unfit, and `runPolicy.maxPreflightRestarts` are used up.",
}


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


_STARTING = frozenset(
    {
        Reason.PODS_STARTING,
        Reason.UNSCHEDULABLE,
        Reason.IMAGE_PULL_FAILED,
        Reason.CONTAINER_NOT_STARTED,
        Reason.REWARD_NOT_SERVED,
    }
)


_RESTARTING = frozenset(
    {Reason.RESTARTING, Reason.STOPPING, Reason.STALLED, Reason.PREFLIGHT_FAILED}
)


def phase_of(conditions: Sequence[Condition]) -> Phase:
    """The one word that sums the conditions up; their order does not matter."""
    for kind, phase in _DECISIVE:
        if is_true(conditions, kind):
            return phase
    running = find(conditions, ConditionType.RUNNING)
    reason = running.reason if running else Reason.PENDING
    if reason in _STARTING:
        return "Starting"
    if reason == Reason.SUSPENDING:
        return "Suspending"
    if reason in _RESTARTING:
        return "Restarting"
    return "Pending"


_DECISIVE: tuple[tuple[ConditionType, Phase], ...] = (
    (ConditionType.SUCCEEDED, "Succeeded"),
    (ConditionType.FAILED, "Failed"),
    (ConditionType.SUSPENDED, "Suspended"),
    (ConditionType.RUNNING, "Running"),
)
