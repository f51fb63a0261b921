"""Rewards with ``placement: service``: for each a Deployment of servers, and a Service before them.

They belong to one attempt, as everything else does: created once, never edited, gone with it.
"""

from collections.abc import Iterator

from tempflow_api import naming
from tempflow_api.pods import RewardPods
from tempflow_api.v1alpha1 import JobSpec, RewardTerm
from tempflow_operator.desired import sandbox
from tempflow_operator.desired.attempt import AttemptOf, Manifest
from tempflow_operator.desired.overrides import with_overrides
from tempflow_operator.settings import Pods

# A request takes seconds, and its client asks again; Kubernetes kills after its own 30 s.
_DRAIN_SECONDS = 20
_GRACE_SECONDS = 30
# A server listens when its model is loaded, which may take the download of gigabytes. Until then
# nobody but the trainer's own deadline judges it.
_PROBE_SECONDS = 5
_MOST_SECONDS_TO_START = 6 * 3600


def endpoints(attempt: AttemptOf) -> dict[str, str]:
    """Where the ranks find each reward that is served to them, by its name."""
    return {
        term.name: f"http://{name}.{attempt.namespace}.svc:{naming.REWARD_PORT}"
        for name, term in _served(attempt)
    }


def servers(attempt: AttemptOf, settings: Pods) -> list[Manifest]:
    """The objects of all of them."""
    return [
        thing
        for name, term in _served(attempt)
        for thing in (
            _service(attempt, name, term),
            _deployment(attempt, name, term, settings),
        )
    ]


def _served(attempt: AttemptOf) -> Iterator[tuple[str, RewardTerm]]:
    for position, term in enumerate(attempt.spec.rewards):
        if term.placement == "service":
            yield naming.reward_name(attempt.job, attempt.number, position), term


def _metadata(attempt: AttemptOf, name: str, term: RewardTerm) -> Manifest:
    return {**attempt.metadata(), "name": name, "labels": attempt.labels(term.name)}


def _service(attempt: AttemptOf, name: str, term: RewardTerm) -> Manifest:
    """One address for all replicas; only those that are ready are behind it."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(attempt, name, term),
        "spec": {
            "selector": attempt.servers_of(term.name),
            "ports": [{"name": "reward", "port": naming.REWARD_PORT, "protocol": "TCP"}],
        },
    }


def _deployment(attempt: AttemptOf, name: str, term: RewardTerm, settings: Pods) -> Manifest:
    pods = _pods_of(attempt.spec, term)
    template = {
        "metadata": {"labels": attempt.labels(term.name)},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": _GRACE_SECONDS,
            "securityContext": sandbox.POD_SECURITY,
            "topologySpreadConstraints": sandbox.spread(attempt.servers_of(term.name)),
            "tolerations": sandbox.tolerations(settings),
            "containers": [_container(attempt, term, pods, settings)],
            "volumes": [*sandbox.folders()[1], *sandbox.cache_volumes(attempt.spec.model_cache)],
        },
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(attempt, name, term),
        "spec": {
            "replicas": pods.replicas,
            "selector": {"matchLabels": attempt.servers_of(term.name)},
            "template": with_overrides(
                template,
                attempt.spec.compute.pod_template,
                container=naming.REWARD_CONTAINER,
                together=None,
            ),
        },
    }


def _pods_of(spec: JobSpec, term: RewardTerm) -> RewardPods:
    asked = (pods for pods in spec.compute.reward_pods if pods.reward == term.name)
    return next(asked, RewardPods(reward=term.name))


def _container(attempt: AttemptOf, term: RewardTerm, pods: RewardPods, settings: Pods) -> Manifest:
    compute, cache = attempt.spec.compute, attempt.spec.model_cache
    return {
        "name": naming.REWARD_CONTAINER,
        "image": pods.image or compute.image or settings.image,
        "command": ["python", "-m", "tempflow_trainer.rewards.serve"],
        "args": _arguments(attempt, term, pods),
        "env": [{"name": key, "value": value} for key, value in sandbox.environment(cache).items()],
        "ports": [
            {"name": "reward", "containerPort": naming.REWARD_PORT, "protocol": "TCP"},
        ],
        "startupProbe": _probe(failureThreshold=_MOST_SECONDS_TO_START // _PROBE_SECONDS),
        "readinessProbe": _probe(),
        # A model that keeps the processor busy answers late.
        "livenessProbe": _probe(timeoutSeconds=10, failureThreshold=6),
        "resources": _resources(attempt.spec, pods),
        "securityContext": sandbox.CONTAINER_SECURITY,
        # Its one line of error is the end of its log.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [*sandbox.folders()[0], *sandbox.cache_mounts(cache)],
        **sandbox.secret_environment(compute),
    }


def _probe(**patience: int) -> Manifest:
    asked = {"path": "/health", "port": "reward"}
    return {"httpGet": asked, "periodSeconds": _PROBE_SECONDS, **patience}


def _arguments(attempt: AttemptOf, term: RewardTerm, pods: RewardPods) -> list[str]:
    """Of ``tempflow_trainer.rewards.serve``; the token's variable, never the token."""
    cached = sandbox.cache_volumes(attempt.spec.model_cache)
    variable = term.service.token_variable if term.service is not None else None
    # Kubernetes replaces $(NAME) in arguments, and reads $$ as a plain $.
    settings = [f"{key}={value}".replace("$", "$$") for key, value in term.parameters.items()]
    return [
        term.uses or term.name,
        *("--host", "0.0.0.0", "--port", str(naming.REWARD_PORT)),  # noqa: S104 - of the pod
        *("--device", pods.device),
        *("--cache", sandbox.CACHE_DIR if cached else f"{sandbox.WORK_DIR}/models"),
        *("--drain", str(_DRAIN_SECONDS)),
        *(("--token-variable", variable) if variable is not None else ()),
        *(word for setting in settings for word in ("--set", setting)),
    ]


def _resources(spec: JobSpec, pods: RewardPods) -> Manifest:
    requests: Manifest = {}
    limits: Manifest = {}
    if pods.cpu is not None:
        requests["cpu"] = pods.cpu
    if pods.memory is not None:
        requests["memory"] = limits["memory"] = pods.memory
    if pods.device == "cuda":
        requests[spec.compute.gpu_resource] = limits[spec.compute.gpu_resource] = "1"
    return {"requests": requests, "limits": limits}
