"""What keeps a gang's pods from running, in the words of who keeps them."""

from typing import NamedTuple

from tempflow_api.conditions import Reason
from tempflow_operator.decisions.observed import Gang, Pod

_PULL_REASONS = frozenset(
    {"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"}
)
_START_REASONS = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
)


class Hindrance(NamedTuple):
    """Of one pod."""

    reason: Reason
    message: str


def of_pods(pods: tuple[Pod, ...]) -> Hindrance | None:
    """Of the first pod by name that has something to tell."""
    for pod in sorted(pods, key=lambda pod: pod.name):
        waiting = pod.waiting
        if waiting is not None and waiting.reason in _PULL_REASONS:
            return Hindrance(Reason.IMAGE_PULL_FAILED, _told(pod.name, waiting.message))
        if waiting is not None and waiting.reason in _START_REASONS:
            return Hindrance(Reason.CONTAINER_NOT_STARTED, _told(pod.name, waiting.message))
        if pod.unschedulable:
            return Hindrance(Reason.UNSCHEDULABLE, _told(pod.name, pod.unschedulable))
    return None


def _told(pod: str, message: str) -> str:
    return f"pod {pod}: {' '.join(message.split())}"


def how_many_run(gang: Gang, pods: tuple[Pod, ...]) -> tuple[int, bool]:
    """Pods that run, and whether all of the gang do or have done."""
    running = sum(pod.phase == "Running" for pod in pods)
    ended = sum(pod.phase == "Succeeded" for pod in pods)
    return running, running + ended >= gang.nodes
