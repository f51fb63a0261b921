"""All pods of an attempt or none: the PodGroup of a scheduler that knows such a thing.

Without one, half of a gang may hold its GPUs and wait for the other half.
"""

from dataclasses import dataclass

from tempflow_operator.desired.attempt import AttemptOf, Manifest


@dataclass(frozen=True)
class GangScheduler:
    """How one scheduler wants to be told which pods belong together."""

    api_version: str
    """Of its PodGroup."""
    scheduler: str
    """What pods name as their scheduler."""
    annotation: str | None = None
    """Of a pod, with the PodGroup's name as its value; or else"""
    label: str | None = None
    """the label."""


SCHEDULERS = {
    # https://volcano.sh/en/docs/podgroup/
    "volcano": GangScheduler(
        "scheduling.volcano.sh/v1beta1", "volcano", annotation="scheduling.k8s.io/group-name"
    ),
    # https://github.com/kubernetes-sigs/scheduler-plugins/tree/master/pkg/coscheduling
    "scheduler-plugins": GangScheduler(
        "scheduling.x-k8s.io/v1alpha1",
        "scheduler-plugins-scheduler",
        label="scheduling.x-k8s.io/pod-group",
    ),
}


def pod_group(attempt: AttemptOf, scheduler: GangScheduler) -> Manifest:
    """Before the Job: its pods are not scheduled without it."""
    return {
        "apiVersion": scheduler.api_version,
        "kind": "PodGroup",
        "metadata": attempt.metadata(),
        "spec": {"minMember": attempt.spec.compute.nodes},
    }


def in_group(template: Manifest, attempt: AttemptOf, scheduler: GangScheduler) -> Manifest:
    """The pod template with what makes its pods members of the attempt's PodGroup."""
    metadata = dict(template["metadata"])
    if scheduler.annotation is not None:
        mark = {scheduler.annotation: attempt.name}
        metadata["annotations"] = {**metadata.get("annotations", {}), **mark}
    if scheduler.label is not None:
        metadata["labels"] = {**metadata["labels"], scheduler.label: attempt.name}
    spec = {**template["spec"], "schedulerName": scheduler.scheduler}
    return {"metadata": metadata, "spec": spec}
