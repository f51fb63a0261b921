"""Rules across fields, each written twice: for the API server (CEL) and for Python.

A test runs both over the same table of manifests. Those about the method alone are in
``method_rules.py``.
"""

import re
from enum import StrEnum
from operator import attrgetter

from tempflow_api.method_rules import METHOD_RULES
from tempflow_api.pods import Volume
from tempflow_api.rule import Rule as Rule
from tempflow_api.v1alpha1 import JobSpec


def _groups_for_every_process(spec: JobSpec) -> bool:
    algorithm, compute = spec.algorithm, spec.compute
    groups = algorithm.prompts_per_epoch * algorithm.seeds_per_prompt // algorithm.updates_per_epoch
    return groups >= compute.nodes * compute.processes_per_node


def _best_metric_exists(spec: JobSpec) -> bool:
    best = spec.checkpoint.keep_best
    return best is None or best.metric in {"reward", *(term.name for term in spec.rewards)}


# What the operator and torchrun set themselves.
_OWN_VARIABLES = (
    "^((TEMPFLOW|PET|TORCHELASTIC|TORCH_ELASTIC)_.*"
    "|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|HOME|USER)$"
)
_OWN_PATHS = (
    "/etc/tempflow",
    "/var/tempflow",
    "/var/cache/tempflow",
    "/home/tempflow",
    "/tmp",  # noqa: S108 - a volume of the pod
    "/dev/shm",  # noqa: S108 - likewise
)


def _one_source(volume: Volume) -> bool:
    sources = (volume.persistent_volume_claim, volume.config_map, volume.secret, volume.empty_dir)
    return sum(source is not None for source in sources) == 1


def _one_cache(spec: JobSpec) -> bool:
    cache = spec.model_cache
    given = (cache.persistent_volume_claim, cache.host_path, cache.empty_dir)
    return sum(place is not None for place in given) <= 1


def _reward_pods_fit(spec: JobSpec) -> bool:
    served = {reward.name for reward in spec.rewards if reward.placement == "service"}
    named = [pods.reward for pods in spec.compute.reward_pods]
    return len(set(named)) == len(named) and served.issuperset(named)


def _count(scope: str, *fields: str) -> str:
    """CEL for how many of these optional fields are there."""
    return " + ".join(f"(has({scope}.{field}) ? 1 : 0)" for field in fields)


def _equal_shares(spec: JobSpec) -> bool:
    algorithm, compute = spec.algorithm, spec.compute
    groups = algorithm.prompts_per_epoch * algorithm.seeds_per_prompt // algorithm.updates_per_epoch
    sharded = compute.strategy == "shard"
    return not sharded or groups % (compute.nodes * compute.processes_per_node) == 0


def _digits(spec: JobSpec) -> bool:
    return spec.model.family == "digits"


def _size_rules(side: str) -> tuple[Rule, ...]:
    """What ``side``, width or height, may be; a rule a side, so that it names the wrong one."""
    size, evaluated = f"self.sampling.{side}", f"self.evaluation.{side}"
    get, get_evaluated = attrgetter(f"sampling.{side}"), attrgetter(f"evaluation.{side}")
    return (
        Rule(
            f"spec.sampling.{side}",
            f"self.model.family == 'digits' || {size} % 16 == 0",
            "is a multiple of 16 for this family",
            lambda spec: _digits(spec) or get(spec) % 16 == 0,
        ),
        Rule(
            f"spec.sampling.{side}",
            f"self.model.family != 'digits' || {size} == 14",
            "is 14 for the digits family, which draws 14 x 14 pixels",
            lambda spec: not _digits(spec) or get(spec) == 14,
        ),
        Rule(
            f"spec.evaluation.{side}",
            f"!has({evaluated}) || (self.model.family == 'digits' "
            f"? {evaluated} == 14 : {evaluated} % 16 == 0)",
            "is what the family can draw: 14 for digits, a multiple of 16 for the others",
            lambda spec: (
                get_evaluated(spec) is None
                or (get_evaluated(spec) == 14 if _digits(spec) else get_evaluated(spec) % 16 == 0)
            ),
        ),
    )


# All scopes are the spec: the API server's cost estimate stays far below its limit, and a rule
# that later needs one more field does not have to move.
RULES: tuple[Rule, ...] = (
    Rule(
        "spec.model.lora",
        "has(self.model.lora) == (self.model.tuning == 'lora')",
        "belongs to tuning: lora, and is required there (write 'lora: {}' for the defaults)",
        lambda spec: (spec.model.lora is not None) == (spec.model.tuning == "lora"),
    ),
    Rule(
        "spec.model.source",
        "!self.model.source.startsWith('builtin:') || "
        "(self.model.source == 'builtin:digits' && self.model.family == 'digits')",
        "the only built-in model is builtin:digits, of family digits",
        lambda spec: (
            not spec.model.source.startswith("builtin:")
            or (spec.model.source == "builtin:digits" and spec.model.family == "digits")
        ),
    ),
    Rule(
        "spec.model.revision",
        "!has(self.model.revision) || "
        "['builtin:', 's3://', 'file://', '/', '.'].all(p, !self.model.source.startsWith(p))",
        "is of a Hugging Face id; a folder, s3:// and builtin: have none: leave it out",
        lambda spec: (
            spec.model.revision is None
            or not spec.model.source.startswith(("builtin:", "s3://", "file://", "/", "."))
        ),
    ),
    Rule(
        "spec.data",
        "has(self.data.prompts) != has(self.data.promptsFile)",
        "exactly one of prompts and promptsFile is given",
        lambda spec: (spec.data.prompts is not None) != (spec.data.prompts_file is not None),
    ),
    Rule(
        "spec.data.promptsConfigMap",
        "!has(self.data.promptsConfigMap) || (has(self.data.promptsFile) && "
        "self.data.promptsFile.matches('^[-._a-zA-Z0-9]+$'))",
        "promptsFile is then a key of that ConfigMap, for instance prompts.txt",
        lambda spec: (
            spec.data.prompts_config_map is None
            or re.fullmatch("[-._a-zA-Z0-9]+", spec.data.prompts_file or "") is not None
        ),
    ),
    *_size_rules("width"),
    *_size_rules("height"),
    *METHOD_RULES,
    Rule(
        "spec.algorithm.updatesPerEpoch",
        "self.algorithm.promptsPerEpoch % self.algorithm.updatesPerEpoch == 0",
        "divides algorithm.promptsPerEpoch: every update takes an equal share of the prompts",
        lambda spec: spec.algorithm.prompts_per_epoch % spec.algorithm.updates_per_epoch == 0,
    ),
    Rule(
        "spec.compute.processesPerNode",
        "self.algorithm.promptsPerEpoch * self.algorithm.seedsPerPrompt "
        "/ self.algorithm.updatesPerEpoch >= self.compute.nodes * self.compute.processesPerNode",
        "more processes than there are (prompt, seed) pairs in an update: some would idle",
        _groups_for_every_process,
    ),
    Rule(
        "spec.compute.tiledDecode",
        "!self.compute.tiledDecode || self.model.family != 'digits'",
        "the digits family has no autoencoder to decode with: leave tiledDecode out",
        lambda spec: not spec.compute.tiled_decode or spec.model.family != "digits",
    ),
    Rule(
        "spec.compute.strategy",
        "self.compute.strategy != 'shard' || "
        "self.algorithm.promptsPerEpoch * self.algorithm.seedsPerPrompt "
        "/ self.algorithm.updatesPerEpoch % (self.compute.nodes * self.compute.processesPerNode) "
        "== 0",
        "with shard all processes work in step: the (prompt, seed) pairs of an update, "
        "promptsPerEpoch x seedsPerPrompt / updatesPerEpoch, are a multiple of the processes, "
        "nodes x processesPerNode",
        _equal_shares,
    ),
    Rule(
        "spec.rewards",
        "self.rewards.exists(r, r.weight != 0.0)",
        "at least one reward has a weight other than 0: there would be nothing to learn from",
        lambda spec: any(reward.weight != 0 for reward in spec.rewards),
    ),
    Rule(
        "spec.rewards",
        "self.rewards.all(r, self.rewards.exists_one(s, s.name == r.name))",
        "no reward is listed twice",
        lambda spec: len({reward.name for reward in spec.rewards}) == len(spec.rewards),
    ),
    Rule(
        "spec.rewards",
        "self.rewards.all(r, !has(r.service) || r.service.timeoutSeconds <= "
        "r.service.deadlineSeconds)",
        "service.timeoutSeconds, of one attempt, is at most service.deadlineSeconds, of all",
        lambda spec: all(
            reward.service is None
            or reward.service.timeout_seconds <= reward.service.deadline_seconds
            for reward in spec.rewards
        ),
    ),
    Rule(
        "spec.rewards",
        "self.rewards.all(r, !has(r.service) || size(r.service.endpoints) == 0 "
        "|| size(r.parameters) == 0)",
        "a reward with service.endpoints has no parameters: they are set where it is served",
        lambda spec: all(
            reward.service is None or not reward.service.endpoints or not reward.parameters
            for reward in spec.rewards
        ),
    ),
    Rule(
        "spec.rewards",
        "self.rewards.all(r, !has(r.service) || "
        "(r.placement == 'service') == (size(r.service.endpoints) == 0))",
        "service.endpoints are those of a service that is there already: give one or more, or let "
        "the operator start it with placement: service and leave them out",
        lambda spec: all(
            reward.service is None
            or (reward.placement == "service") == (not reward.service.endpoints)
            for reward in spec.rewards
        ),
    ),
    Rule(
        "spec.checkpoint.uri",
        "self.compute.nodes == 1 || "
        "(has(self.checkpoint.uri) && self.checkpoint.uri.startsWith('s3://'))",
        "starts with s3:// when compute.nodes is above 1: the nodes share no disk",
        lambda spec: spec.compute.nodes == 1 or (spec.checkpoint.uri or "").startswith("s3://"),
    ),
    Rule(
        "spec.checkpoint.keepBest.metric",
        "!has(self.checkpoint.keepBest) || self.checkpoint.keepBest.metric == 'reward' || "
        "self.rewards.exists(r, r.name == self.checkpoint.keepBest.metric)",
        "is reward, or the name of one of spec.rewards",
        _best_metric_exists,
    ),
    Rule(
        "spec.initFrom.uri",
        "!has(self.initFrom) || self.compute.nodes == 1 || self.initFrom.uri.startsWith('s3://')",
        "starts with s3:// when compute.nodes is above 1: the nodes share no disk",
        lambda spec: (
            spec.init_from is None
            or spec.compute.nodes == 1
            or spec.init_from.uri.startswith("s3://")
        ),
    ),
    Rule(
        "spec.compute.gpusPerProcess",
        "self.compute.device != 'cuda' || !has(self.compute.gpusPerProcess) "
        "|| self.compute.gpusPerProcess >= 1",
        "is at least 1 with device cuda",
        lambda spec: spec.compute.device != "cuda" or spec.compute.gpus_per_process != 0,
    ),
    Rule(
        "spec.compute.extendedResources",
        "self.compute.extendedResources.all(k, k.contains('/') && k != self.compute.gpuResource)",
        "names have a domain (rdma/ib), and gpuResource is not among them: that is requested by "
        "gpusPerProcess",
        lambda spec: all(
            "/" in name and name != spec.compute.gpu_resource
            for name in spec.compute.extended_resources
        ),
    ),
    Rule(
        "spec.compute.podTemplate.labels",
        "self.compute.podTemplate.labels.all(k, !k.startsWith('tempflow.dev/') "
        "&& !k.startsWith('batch.kubernetes.io/'))",
        "do not begin with tempflow.dev/ or batch.kubernetes.io/: the operator finds pods by these",
        lambda spec: (
            not any(
                key.startswith(("tempflow.dev/", "batch.kubernetes.io/"))
                for key in spec.compute.pod_template.labels
            )
        ),
    ),
    Rule(
        "spec.compute.podTemplate.env",
        f"self.compute.podTemplate.env.all(e, !e.name.matches('{_OWN_VARIABLES}'))",
        "does not name what the operator and torchrun set themselves: TEMPFLOW_*, PET_*, RANK, "
        "WORLD_SIZE, MASTER_ADDR, MASTER_PORT, HOME, USER and the like",
        lambda spec: (
            not any(
                re.match(_OWN_VARIABLES, variable.name)
                for variable in spec.compute.pod_template.env
            )
        ),
    ),
    Rule(
        "spec.compute.podTemplate.volumes",
        "self.compute.podTemplate.volumes.all(v, "
        + _count("v", "persistentVolumeClaim", "configMap", "secret", "emptyDir")
        + " == 1)",
        "each has exactly one of persistentVolumeClaim, configMap, secret and emptyDir",
        lambda spec: all(_one_source(volume) for volume in spec.compute.pod_template.volumes),
    ),
    Rule(
        "spec.compute.podTemplate.volumes",
        f"self.compute.podTemplate.volumes.all(v, !(v.mountPath in {list(_OWN_PATHS)!r}))",
        f"are not mounted at {', '.join(_OWN_PATHS)}: the trainer has volumes of its own there",
        lambda spec: (
            not any(volume.mount_path in _OWN_PATHS for volume in spec.compute.pod_template.volumes)
        ),
    ),
    Rule(
        "spec.compute.rewardPods",
        "self.compute.rewardPods.all(p, self.rewards.exists(r, r.name == p.reward && "
        "r.placement == 'service') && self.compute.rewardPods.exists_one(q, q.reward == p.reward))",
        "each names a reward with placement: service, and no two the same one",
        _reward_pods_fit,
    ),
    Rule(
        "spec.modelCache",
        _count("self.modelCache", "persistentVolumeClaim", "hostPath", "emptyDir") + " <= 1",
        "has at most one of persistentVolumeClaim, hostPath and emptyDir",
        _one_cache,
    ),
)


def broken_rules(spec: JobSpec) -> list[Rule]:
    """The rules that ``spec`` does not keep, in the order of the table."""
    return [rule for rule in RULES if not rule.holds(spec)]


class Mutability(StrEnum):
    """When a field of an existing job may change."""

    IMMUTABLE = "immutable"
    WHILE_SUSPENDED = "mutable while suspended"
    MUTABLE = "mutable"


# Everything not listed is immutable: it decides what is learned, and a run that changes it in the
# middle is another run. A prefix covers all fields below it. Between two starts of the same local
# run a job counts as suspended.
FIELD_MUTABILITY: dict[str, Mutability] = {
    "spec.algorithm.epochs": Mutability.WHILE_SUSPENDED,
    "spec.optimizer.learningRate": Mutability.WHILE_SUSPENDED,
    "spec.evaluation.everyEpochs": Mutability.WHILE_SUSPENDED,
    "spec.selfTest": Mutability.WHILE_SUSPENDED,
    "spec.guard": Mutability.WHILE_SUSPENDED,
    "spec.checkpoint.everyEpochs": Mutability.WHILE_SUSPENDED,
    "spec.checkpoint.keepLast": Mutability.MUTABLE,
    "spec.checkpoint.keepEvery": Mutability.MUTABLE,
    "spec.checkpoint.keepBest": Mutability.MUTABLE,
    "spec.checkpoint.saveTimeoutSeconds": Mutability.WHILE_SUSPENDED,
    "spec.checkpoint.maxWaitSeconds": Mutability.WHILE_SUSPENDED,
    "spec.checkpoint.maxFailedSaves": Mutability.WHILE_SUSPENDED,
    "spec.checkpoint.endpointUrl": Mutability.WHILE_SUSPENDED,
    "spec.checkpoint.region": Mutability.WHILE_SUSPENDED,
    "spec.compute": Mutability.WHILE_SUSPENDED,
    "spec.modelCache": Mutability.WHILE_SUSPENDED,
    # A queue decides on an attempt when it is created.
    "spec.runPolicy.queue": Mutability.WHILE_SUSPENDED,
    "spec.runPolicy": Mutability.MUTABLE,
    "spec.tracking": Mutability.WHILE_SUSPENDED,
}


def mutability_of(path: str) -> Mutability:
    """When the field at ``path`` (``spec.…`` in camelCase) may change."""
    for prefix, mutability in FIELD_MUTABILITY.items():
        if path == prefix or path.startswith((f"{prefix}.", f"{prefix}[")):
            return mutability
    return Mutability.IMMUTABLE


def changed_fields(old: JobSpec, new: JobSpec) -> list[str]:
    """Paths of the fields in which two specifications differ, sorted.

    A list counts as one field; a section that is present in one of the two only, too.
    """
    return sorted(
        _differences(
            old.model_dump(mode="json", by_alias=True),
            new.model_dump(mode="json", by_alias=True),
            "spec",
        )
    )


def _differences(old: object, new: object, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{path}.{key}")
        ]
    return [] if old == new else [path]
