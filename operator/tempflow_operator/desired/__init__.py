"""The objects of one attempt, as a function of the job: no clock, no chance, no network.

An attempt takes its configuration when it is created and is never edited. Another configuration,
and another operator's way of writing these objects, waits for the next attempt.
"""

from tempflow_operator.desired.attempt import AttemptOf, Manifest
from tempflow_operator.desired.config import config_map
from tempflow_operator.desired.gang import SCHEDULERS, pod_group
from tempflow_operator.desired.network import network_policy
from tempflow_operator.desired.rendezvous import service
from tempflow_operator.desired.rewards import servers
from tempflow_operator.desired.workers import workers
from tempflow_operator.settings import Pods

__all__ = ["AttemptOf", "Manifest", "objects"]


def objects(attempt: AttemptOf, settings: Pods) -> list[Manifest]:
    """In the order of creation. The ConfigMap comes last: no pod starts without it, so where it
    is missing nothing has run under the attempt's number, and where it is the number is used, even
    if somebody has deleted the Job meanwhile."""
    scheduler = SCHEDULERS.get(settings.gang_scheduler)
    policy = attempt.spec.compute.network.policy
    return [
        service(attempt),
        *([network_policy(attempt)] if policy else []),
        *([pod_group(attempt, scheduler)] if scheduler is not None else []),
        *servers(attempt, settings),
        workers(attempt, settings),
        config_map(attempt),
    ]
