"""For every rule across fields a manifest that breaks it.

Plain data, so that the API server's version of the rules can be run over the same table.
"""

import copy
from dataclasses import dataclass
from typing import Any

from tempflow_api.rules import RULES, Rule

VALID: dict[str, Any] = {
    "apiVersion": "tempflow.dev/v1alpha1",
    "kind": "TempFlowGRPOJob",
    "metadata": {"name": "demo"},
    "spec": {
        "model": {
            "family": "digits",
            "source": "builtin:digits",
            "tuning": "lora",
            "lora": {"rank": 8},
        },
        "data": {"prompts": ["a three", "a four"]},
        "sampling": {"steps": 10, "width": 14, "height": 14},
        "algorithm": {
            "promptsPerEpoch": 4,
            "seedsPerPrompt": 2,
            "branchesPerSeed": 6,
            "updatesPerEpoch": 1,
        },
        "rewards": [{"name": "digit-ink", "weight": 1.0}],
        "compute": {"device": "cpu"},
    },
}


@dataclass(frozen=True)
class Breaker:
    """Fields to set in the valid manifest, by path below ``spec``; None removes one."""

    name: str
    rule: int
    """Position in ``RULES``."""
    fields: dict[str, Any]
    """Rules that cannot but break with it."""

    def manifest(self) -> dict[str, Any]:
        """The broken manifest."""
        broken = copy.deepcopy(VALID)
        for path, value in self.fields.items():
            *parents, last = path.split(".")
            block = broken["spec"]
            for parent in parents:
                block = block.setdefault(parent, {})
            if value is None:
                del block[last]
            else:
                block[last] = value
        return broken


def _position(start: str, path: str) -> int:
    """Of the one rule at ``path`` whose message begins so."""
    found = [i for i, r in enumerate(RULES) if r.path == path and r.message.startswith(start)]
    assert len(found) == 1, (start, path, found)
    return found[0]


_LORA = _position("belongs to tuning", "spec.model.lora")
_BUILTIN = _position("the only built-in", "spec.model.source")
_REVISION = _position("is of a Hugging Face id", "spec.model.revision")
_PROMPTS = _position("exactly one", "spec.data")
_PROMPTS_KEY = _position("promptsFile is then", "spec.data.promptsConfigMap")
_SIXTEEN_WIDE = _position("is a multiple of 16", "spec.sampling.width")
_SIXTEEN_HIGH = _position("is a multiple of 16", "spec.sampling.height")
_FOURTEEN_WIDE = _position("is 14", "spec.sampling.width")
_FOURTEEN_HIGH = _position("is 14", "spec.sampling.height")
_EVALUATED_WIDTH = _position("is what the family", "spec.evaluation.width")
_EVALUATED_HEIGHT = _position("is what the family", "spec.evaluation.height")
_LAST_STEP = _position("each is less", "spec.algorithm.branchSteps")
_STEP_TWICE = _position("no step", "spec.algorithm.branchSteps")
_NO_BRANCHES = _position("is 1 with", "spec.algorithm.branchesPerSeed")
_PROMPT_SCOPE = _position("is prompt with", "spec.algorithm.advantage.scope")
_CANDIDATES = _position("is at most the number", "spec.algorithm.branchSet.count")
_COUNT_OF_ALL = _position("is left out with choose", "spec.algorithm.branchSet.count")
_NO_SLIDING = _position("is left out unless choose", "spec.algorithm.branchSet.everyEpochs")
_NO_DEVIATION = _position("is left out with deviation", "spec.algorithm.advantage.epsilon")
_NO_DIVERGENCE = _position("is left out where klCoefficient", "spec.algorithm.klForm")
_NO_TAIL = _position("is left out where flow-grpo", "spec.sampling.tail")
_CPS_WEIGHTS = _position("is none with sde cps", "spec.algorithm.weighting")
_CPS_KL = _position("is exact or velocity", "spec.algorithm.klForm")
_CPS_MERGE = _position("is 0 with sde cps", "spec.algorithm.mergeBelow")
_MERGE_ALL = _position("is less than", "spec.algorithm.mergeBelow")
_CPS_NOISE = _position("is at most 1", "spec.sampling.noiseLevel")
_SHORT_DPM2 = _position("is at least 3", "spec.sampling.tail.steps")
_NO_UNCONDITIONAL = _position("is both without", "spec.algorithm.guidanceGradient")
_TWO_DRAWS = _position("a group needs", "spec.algorithm.branchesPerSeed")
_EQUAL_SHARES = _position("divides", "spec.algorithm.updatesPerEpoch")
_IDLE = _position("more processes", "spec.compute.processesPerNode")
_NO_TILES = _position("the digits family has no", "spec.compute.tiledDecode")
_IN_STEP = _position("with shard", "spec.compute.strategy")
_NO_WEIGHT = _position("at least one reward", "spec.rewards")
_REWARD_TWICE = _position("no reward is listed", "spec.rewards")
_ATTEMPT_LONGER = _position("service.timeoutSeconds", "spec.rewards")
_SERVED_PARAMETERS = _position("a reward with service.endpoints", "spec.rewards")
_WHOSE_SERVICE = _position("service.endpoints are", "spec.rewards")
_SHARED_STORE = _position("starts with s3://", "spec.checkpoint.uri")
_BEST_METRIC = _position("is reward", "spec.checkpoint.keepBest.metric")
_SHARED_SOURCE = _position("starts with s3://", "spec.initFrom.uri")

_NO_GPU = _position("is at least 1", "spec.compute.gpusPerProcess")
_RESOURCES = _position("names have", "spec.compute.extendedResources")
_POD_LABELS = _position("do not begin", "spec.compute.podTemplate.labels")
_OWN_ENV = _position("does not name", "spec.compute.podTemplate.env")
_ONE_SOURCE = _position("each has", "spec.compute.podTemplate.volumes")
_OWN_PATHS = _position("are not mounted", "spec.compute.podTemplate.volumes")
_REWARD_PODS = _position("each names a reward", "spec.compute.rewardPods")
_ONE_CACHE = _position("has at most", "spec.modelCache")

_SERVICE = {"endpoints": ["http://scorer:8090"]}
_SD3 = {"model.family": "sd3", "model.source": "owner/name"}

BREAKERS = (
    Breaker("lora with full tuning", _LORA, {"model.tuning": "full"}),
    Breaker("no lora with lora tuning", _LORA, {"model.lora": None}),
    Breaker("another built-in", _BUILTIN, {"model.source": "builtin:faces"}),
    Breaker(
        "built-in of another family",
        _BUILTIN,
        {"model.family": "sd3", "sampling.width": 64, "sampling.height": 64},
    ),
    Breaker("a revision of no repository", _REVISION, {"model.revision": "main"}),
    Breaker("no prompts", _PROMPTS, {"data.prompts": None}),
    Breaker("both kinds of prompts", _PROMPTS, {"data.promptsFile": "prompts.txt"}),
    Breaker("prompts in a ConfigMap and none named", _PROMPTS_KEY, {"data.promptsConfigMap": "p"}),
    Breaker(
        "a path in a ConfigMap",
        _PROMPTS_KEY,
        {"data.prompts": None, "data.promptsFile": "a/b.txt", "data.promptsConfigMap": "p"},
    ),
    Breaker("odd width", _SIXTEEN_WIDE, {**_SD3, "sampling.width": 500, "sampling.height": 512}),
    Breaker("odd height", _SIXTEEN_HIGH, {**_SD3, "sampling.width": 512, "sampling.height": 520}),
    Breaker("wide digits", _FOURTEEN_WIDE, {"sampling.width": 28}),
    Breaker("high digits", _FOURTEEN_HIGH, {"sampling.height": 28}),
    Breaker("wide evaluation of digits", _EVALUATED_WIDTH, {"evaluation.width": 28}),
    Breaker(
        "odd height of an evaluation",
        _EVALUATED_HEIGHT,
        {**_SD3, "sampling.width": 64, "sampling.height": 64, "evaluation.height": 72},
    ),
    Breaker("last step", _LAST_STEP, {"algorithm.branchSteps": [0, 9]}),
    Breaker("step twice", _STEP_TWICE, {"algorithm.branchSteps": [3, 0, 3]}),
    Breaker(
        "branches with flow-grpo",
        _NO_BRANCHES,
        {"algorithm.method": "flow-grpo", "algorithm.advantage": {"scope": "prompt"}},
    ),
    Breaker(
        "seed scope with flow-grpo",
        _PROMPT_SCOPE,
        {"algorithm.method": "flow-grpo", "algorithm.branchesPerSeed": 1},
    ),
    Breaker("one draw a seed", _TWO_DRAWS, {"algorithm.branchesPerSeed": 1}),
    Breaker(
        "one draw a prompt",
        _TWO_DRAWS,
        {
            "algorithm.branchesPerSeed": 1,
            "algorithm.seedsPerPrompt": 1,
            "algorithm.advantage": {"scope": "prompt"},
        },
    ),
    Breaker(
        "one draw of a window",
        _TWO_DRAWS,
        {
            "algorithm.method": "flow-grpo",
            "algorithm.branchSet": {"choose": "window", "count": 2},
            "algorithm.branchesPerSeed": 1,
        },
    ),
    Breaker(
        "more than all steps",
        _CANDIDATES,
        {"algorithm.branchSet": {"choose": "first", "count": 10}},
    ),
    Breaker(
        "more than listed",
        _CANDIDATES,
        {
            "algorithm.branchSteps": [0, 1, 2],
            "algorithm.branchSet": {"choose": "random", "count": 4},
        },
    ),
    Breaker("a number of all", _COUNT_OF_ALL, {"algorithm.branchSet": {"count": 2}}),
    Breaker(
        "a window that never slides",
        _NO_SLIDING,
        {"algorithm.branchSet": {"choose": "window", "count": 2, "everyEpochs": 5}},
    ),
    Breaker(
        "beside no deviation",
        _NO_DEVIATION,
        {"algorithm.advantage": {"deviation": "none", "epsilon": 0.1}},
    ),
    Breaker(
        "a form of nothing",
        _NO_DIVERGENCE,
        {"algorithm.klCoefficient": 0, "algorithm.klForm": "velocity"},
    ),
    *(
        Breaker(
            f"a tail of nothing, {name}",
            _NO_TAIL,
            {
                "algorithm.method": "flow-grpo",
                "algorithm.branchesPerSeed": 1,
                "algorithm.advantage": {"scope": "prompt"},
                "sampling.tail": tail,
            },
        )
        for name, tail in (("dpm2", {"solver": "dpm2"}), ("short", {"steps": 2}))
    ),
    Breaker("weights with cps", _CPS_WEIGHTS, {"sampling.sde": "cps"}),
    Breaker(
        "guard with cps",
        _CPS_WEIGHTS,
        {"sampling.sde": "cps", "algorithm.weighting": "guard"},
    ),
    Breaker(
        "kl without dt with cps",
        _CPS_KL,
        {"sampling.sde": "cps", "algorithm.weighting": "none", "algorithm.klForm": "no-dt"},
    ),
    Breaker(
        "merging with cps",
        _CPS_MERGE,
        {"sampling.sde": "cps", "algorithm.weighting": "none", "algorithm.mergeBelow": 0.1},
    ),
    Breaker("merging everything", _MERGE_ALL, {"algorithm.mergeBelow": 0.7}),
    Breaker(
        "loud cps",
        _CPS_NOISE,
        {"sampling.sde": "cps", "algorithm.weighting": "none", "sampling.noiseLevel": 1.2},
    ),
    Breaker(
        "second order of two steps",
        _SHORT_DPM2,
        {"sampling.tail": {"solver": "dpm2", "steps": 2}},
    ),
    Breaker(
        "second order of three steps in all",
        _SHORT_DPM2,
        {"sampling.tail": {"solver": "dpm2"}, "sampling.steps": 3},
    ),
    Breaker(
        "gradient of no guidance",
        _NO_UNCONDITIONAL,
        {"sampling.guidanceScale": 1.0, "algorithm.guidanceGradient": "conditional"},
    ),
    Breaker(
        "gradient of no guidance in training",
        _NO_UNCONDITIONAL,
        {"sampling.trainingGuidanceScale": 1.0, "algorithm.guidanceGradient": "conditional"},
    ),
    Breaker(
        "gradient of embedded guidance",
        _NO_UNCONDITIONAL,
        {
            "model.family": "flux",
            "model.source": "owner/name",
            "sampling.width": 64,
            "sampling.height": 64,
            "algorithm.guidanceGradient": "conditional",
        },
    ),
    Breaker("unequal shares", _EQUAL_SHARES, {"algorithm.updatesPerEpoch": 3}),
    Breaker("too many processes", _IDLE, {"compute.processesPerNode": 9}),
    Breaker("tiles without autoencoder", _NO_TILES, {"compute.tiledDecode": True}),
    Breaker(
        "a share too many",
        _IN_STEP,
        {"compute.strategy": "shard", "compute.processesPerNode": 3},
    ),
    Breaker(
        "nothing to learn from", _NO_WEIGHT, {"rewards": [{"name": "digit-ink", "weight": 0.0}]}
    ),
    Breaker(
        "reward twice", _REWARD_TWICE, {"rewards": [{"name": "digit-ink"}, {"name": "digit-ink"}]}
    ),
    Breaker(
        "attempt longer than deadline",
        _ATTEMPT_LONGER,
        {"rewards": [{"name": "digit-ink", "service": _SERVICE | {"timeoutSeconds": 601.0}}]},
    ),
    Breaker(
        "parameters of a served reward",
        _SERVED_PARAMETERS,
        {
            "rewards": [
                {"name": "digit-ink", "service": _SERVICE, "parameters": {"target": "0.3"}},
            ]
        },
    ),
    Breaker(
        "a service of nowhere", _WHOSE_SERVICE, {"rewards": [{"name": "digit-ink", "service": {}}]}
    ),
    Breaker(
        "a service of ours and of others",
        _WHOSE_SERVICE,
        {"rewards": [{"name": "digit-ink", "placement": "service", "service": _SERVICE}]},
    ),
    Breaker("nodes without store", _SHARED_STORE, {"compute.nodes": 2}),
    Breaker(
        "nodes with a folder",
        _SHARED_STORE,
        {"compute.nodes": 2, "checkpoint": {"uri": "/mnt/runs"}},
    ),
    Breaker("a metric that nobody measures", _BEST_METRIC, {"checkpoint.keepBest.metric": "other"}),
    Breaker(
        "nodes that start from a folder",
        _SHARED_SOURCE,
        {
            "compute.nodes": 2,
            "checkpoint.uri": "s3://bucket/runs",
            "initFrom": {"uri": "/mnt/runs/other"},
        },
    ),
    Breaker("cuda without a GPU", _NO_GPU, {"compute.device": "cuda", "compute.gpusPerProcess": 0}),
    Breaker("no domain", _RESOURCES, {"compute.extendedResources": {"rdma": 1}}),
    Breaker("the GPU twice", _RESOURCES, {"compute.extendedResources": {"nvidia.com/gpu": 1}}),
    Breaker("our label", _POD_LABELS, {"compute.podTemplate.labels": {"tempflow.dev/role": "x"}}),
    Breaker(
        "our variable",
        _OWN_ENV,
        {"compute.podTemplate.env": [{"name": "TEMPFLOW_ATTEMPT", "value": "9"}]},
    ),
    Breaker(
        "torchrun's variable",
        _OWN_ENV,
        {"compute.podTemplate.env": [{"name": "LOCAL_WORLD_SIZE", "value": "9"}]},
    ),
    Breaker(
        "a volume of nothing",
        _ONE_SOURCE,
        {"compute.podTemplate.volumes": [{"name": "a", "mountPath": "/a"}]},
    ),
    Breaker(
        "a volume of two things",
        _ONE_SOURCE,
        {
            "compute.podTemplate.volumes": [
                {"name": "a", "mountPath": "/a", "secret": "s", "emptyDir": "1Gi"}
            ]
        },
    ),
    Breaker(
        "a volume over ours",
        _OWN_PATHS,
        {"compute.podTemplate.volumes": [{"name": "a", "mountPath": "/tmp", "emptyDir": "1Gi"}]},
    ),
    Breaker(
        "pods of a reward in the trainer",
        _REWARD_PODS,
        {"compute.rewardPods": [{"reward": "digit-ink"}]},
    ),
    Breaker("pods of no reward", _REWARD_PODS, {"compute.rewardPods": [{"reward": "other"}]}),
    Breaker(
        "pods of a reward twice",
        _REWARD_PODS,
        {
            "rewards": [{"name": "digit-ink", "placement": "service"}],
            "compute.rewardPods": [{"reward": "digit-ink"}, {"reward": "digit-ink"}],
        },
    ),
    Breaker("two caches", _ONE_CACHE, {"modelCache": {"hostPath": "/cache", "emptyDir": "1Gi"}}),
)


def rule_of(breaker: Breaker) -> Rule:
    """The rule that a breaker is for."""
    return RULES[breaker.rule]
