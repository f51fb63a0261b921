"""Why an attempt failed, where it began, and how long to wait before the next one."""

import hashlib
import re
from enum import StrEnum
from typing import NamedTuple

from tempflow_api.errors import ASKED_TO_STOP, PERMANENT, ExitCode
from tempflow_api.naming import TRAINER_CONTAINER
from tempflow_api.status import Failure
from tempflow_operator.decisions.observed import Gang, Pod, Why
from tempflow_operator.settings import Timing

_OOM_KILLED = "OOMKilled"
_DELETED = "JobDeleted"


class FailureClass(StrEnum):
    """What follows from a failure."""

    PERMANENT = "permanent"
    """A further attempt would end the same way."""
    RETRIABLE = "retriable"
    """A further attempt makes sense and uses one of ``maxRestarts``."""
    PREFLIGHT = "preflight"
    """Nothing was trained, because a check before found the pods unfit: a further attempt, perhaps
    on other nodes, which uses one of ``maxPreflightRestarts``."""
    DISRUPTION = "disruption"
    """The cluster took pods away: a further attempt, which uses none."""


class Ending(NamedTuple):
    """How an attempt failed."""

    failure_class: FailureClass
    cause: Failure


def classify(gang: Gang, pods: tuple[Pod, ...]) -> Ending:
    """The class and the first cause of a gang's failure.

    Pods are the better witnesses, with node, code and last words; but those that the Job
    controller has deleted are gone soon, and then the Job's own message has to do.
    """
    suspects = [(_weight(pod), _moment(pod), pod.name, pod) for pod in pods if _failed(pod)]
    told = _from_gang(gang.failing or Why(reason=_DELETED))
    if not suspects:
        return told
    weight, _, _, pod = min(suspects, key=lambda suspect: suspect[:3])
    if weight < _BYSTANDER:
        return Ending(_class_of_pod(pod), _cause_in_pod(pod))
    named = next((suspect[3] for suspect in suspects if suspect[2] == told.cause.pod), pod)
    if told.failure_class in (FailureClass.PERMANENT, FailureClass.PREFLIGHT):
        return told
    return Ending(FailureClass.DISRUPTION, _cause_in_pod(named))


def _failed(pod: Pod) -> bool:
    return pod.disruption is not None or (
        pod.phase == "Failed" or (pod.ended is not None and pod.ended.exit_code != 0)
    )


# Stronger evidence first. Time alone does not tell: a container's end is known to the second, and
# within that second the ranks that were waiting for the failed one fail too.
_BYSTANDER = 4


def _weight(pod: Pod) -> int:
    ended = pod.ended
    if ended is not None and (
        ended.exit_code in PERMANENT or ended.exit_code == ExitCode.PREFLIGHT
    ):
        return 0
    if pod.disruption is not None:
        return 1
    if ended is not None and ended.reason == _OOM_KILLED:
        return 2
    if ended is None or ended.exit_code in ASKED_TO_STOP or pod.deleting:
        return _BYSTANDER
    return 3


def _moment(pod: Pod) -> float:
    moments = [
        witness.time
        for witness in (pod.ended, pod.disruption)
        if witness is not None and witness.time is not None
    ]
    return min(moments, default=float("inf"))


def _class_of_pod(pod: Pod) -> FailureClass:
    if pod.ended is not None and pod.ended.exit_code in PERMANENT:
        return FailureClass.PERMANENT
    if pod.ended is not None and pod.ended.exit_code == ExitCode.PREFLIGHT:
        return FailureClass.PREFLIGHT
    if pod.disruption is not None:
        return FailureClass.DISRUPTION
    return FailureClass.RETRIABLE


def _cause_in_pod(pod: Pod) -> Failure:
    ended, disruption = pod.ended, pod.disruption
    words = ended.message if ended is not None else ""
    if disruption is not None and not words:
        words = disruption.message
    return Failure(
        pod=pod.name,
        node=pod.node,
        container=TRAINER_CONTAINER if ended is not None else "",
        exit_code=ended.exit_code if ended is not None else None,
        reason=(disruption.reason if disruption is not None else ended.reason if ended else ""),
        message=last_line(words),
    )


# "Container trainer for pod ns/demo-a1-0 failed with exit code 83 matching FailJob rule at index 0"
# "Pod ns/demo-a1-1 has condition DisruptionTarget matching FailJob rule at index 1"
_POD_IN_MESSAGE = re.compile(r"[Pp]od [^/\s]+/(\S+)")
_CODE_IN_MESSAGE = re.compile(r"exit code (\d+)")


def _from_gang(why: Why) -> Ending:
    pod = _POD_IN_MESSAGE.search(why.message)
    code = _CODE_IN_MESSAGE.search(why.message)
    exit_code = int(code[1]) if code else None
    cause = Failure(
        pod=pod[1][:1024] if pod else "",
        exit_code=exit_code,
        reason=why.reason[:1024],
        message=last_line(why.message),
    )
    if exit_code in PERMANENT:
        return Ending(FailureClass.PERMANENT, cause)
    if exit_code == ExitCode.PREFLIGHT:
        return Ending(FailureClass.PREFLIGHT, cause)
    taken = exit_code in ASKED_TO_STOP or "DisruptionTarget" in why.message
    if taken or why.reason == _DELETED:
        return Ending(FailureClass.DISRUPTION, cause)
    return Ending(FailureClass.RETRIABLE, cause)


def last_line(text: str) -> str:
    """The last line that says anything, cut to what status has room for."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:1024] if lines else ""


def sentence(cause: Failure) -> str:
    """The cause in one line, for conditions and events."""
    where = ", ".join(
        f"{noun} {value}"
        for noun, value in (
            ("pod", cause.pod),
            ("node", cause.node),
            ("container", cause.container),
        )
        if value
    )
    code = f"exit code {cause.exit_code}" if cause.exit_code is not None else ""
    what = " ".join(word for word in (code, f"({cause.reason})" if cause.reason else "") if word)
    return ": ".join(part for part in (where, what, cause.message) if part)


def pause(failure_class: FailureClass, count: int, timing: Timing, *, salt: str) -> float:
    """Seconds before the next attempt, after ``count`` endings of that class.

    The spread of a fifth either way keeps jobs that fail together from starting together. It is
    drawn from ``salt``, not from chance: a pass that is repeated after a crash decides the same.
    """
    first = (
        timing.disruption_delay
        if failure_class is FailureClass.DISRUPTION
        else timing.restart_delay
    )
    steady = min(first * 2.0 ** min(max(count, 1) - 1, 32), timing.restart_delay_limit)
    digest = hashlib.sha256(salt.encode()).digest()
    return steady * (0.8 + 0.4 * int.from_bytes(digest[:4], "big") / 2**32)
