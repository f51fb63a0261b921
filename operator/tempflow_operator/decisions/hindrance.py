"""What keeps an attempt's pods from running, in the words of who keeps them."""

from typing import NamedTuple

from tempflow_api.conditions import Reason
from tempflow_api.v1alpha1 import JobSpec
from tempflow_operator.decisions import failure
from tempflow_operator.decisions.observed import Gang, Pod, Servers, Snapshot

_PULL_REASONS = frozenset(
    {"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"}
)
_START_REASONS = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
)


_CRASH_REASON = "CrashLoopBackOff"


class Hindrance(NamedTuple):
    """Of one pod, or of the servers of a reward."""

    reason: Reason
    message: str


def of_attempt(seen: Snapshot, attempt: int) -> Hindrance | None:
    """Of its ranks, or else of a reward that nobody serves."""
    told = of_pods(seen.pods_of(attempt))
    return told if told is not None else of_servers(seen, attempt)


def of_servers(seen: Snapshot, attempt: int) -> Hindrance | None:
    """Of the first reward by name that has no server which is ready, and something to tell."""
    for servers in sorted(seen.servers_of(attempt), key=lambda servers: servers.reward):
        told = _of_reward(servers, seen.pods_serving(attempt, servers.reward))
        if told is not None:
            return Hindrance(told.reason, f"reward {servers.reward}: {told.message}")
    return None


def _of_reward(servers: Servers, pods: tuple[Pod, ...]) -> Hindrance | None:
    if any(pod.ready for pod in pods):
        return None
    if not pods and servers.failure:
        return Hindrance(Reason.REWARD_NOT_SERVED, servers.failure)
    return of_pods(pods)


def unserved(spec: JobSpec, seen: Snapshot, attempt: int) -> list[str]:
    """Rewards that the operator serves and for which no server is ready."""
    return [
        term.name
        for term in spec.rewards
        if term.placement == "service"
        and not any(pod.ready for pod in seen.pods_serving(attempt, term.name))
    ]


def of_pods(pods: tuple[Pod, ...]) -> Hindrance | None:
    """Of the first pod by name that has something to tell."""
    for pod in sorted(pods, key=lambda pod: pod.name):
        waiting = pod.waiting
        if waiting is not None and waiting.reason in _PULL_REASONS:
            return Hindrance(Reason.IMAGE_PULL_FAILED, _told(pod.name, waiting.message))
        if waiting is not None and waiting.reason in _START_REASONS:
            return Hindrance(Reason.CONTAINER_NOT_STARTED, _told(pod.name, waiting.message))
        if waiting is not None and waiting.reason == _CRASH_REASON:
            return Hindrance(Reason.REWARD_NOT_SERVED, _told(pod.name, _crash(pod)))
        if pod.unschedulable:
            return Hindrance(Reason.UNSCHEDULABLE, _told(pod.name, pod.unschedulable))
    return None


def _crash(pod: Pod) -> str:
    ended = pod.ended
    if ended is None:
        return "it ends again and again"
    return f"exit code {ended.exit_code} ({ended.reason}): {failure.last_line(ended.message)}"


def _told(pod: str, message: str) -> str:
    return f"pod {pod}: {' '.join(message.split())}"


def how_many_run(gang: Gang, pods: tuple[Pod, ...]) -> tuple[int, bool]:
    """Pods that run, and whether all of the gang do or have done."""
    running = sum(pod.phase == "Running" for pod in pods)
    ended = sum(pod.phase == "Succeeded" for pod in pods)
    return running, running + ended >= gang.nodes
