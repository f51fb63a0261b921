"""Every field of the spec with another value, for whoever asks what a change of it does."""

import copy
from collections.abc import Iterator
from typing import Any

from tempflow_api import crd

Raw = dict[str, Any]


def leaves(node: Raw, path: str = "") -> Iterator[tuple[str, Raw]]:
    """Every field that has no fields of its own, with its schema."""
    for name, child in node["properties"].items():
        if "properties" in child:
            yield from leaves(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


LEAVES = dict(leaves(crd.spec_schema()))
# Another value that the schema and the rules take, where the first that fits the type does not.
OTHER: dict[str, object] = {
    "algorithm.advantage.scope": "prompt",
    "algorithm.branchSet.count": None,  # takes a choice other than all
    "algorithm.branchSet.everyEpochs": None,  # takes a sliding window
    "algorithm.branchSteps": [0],
    "algorithm.method": None,  # takes three fields at once
    "algorithm.promptsPerEpoch": 8,
    "algorithm.updatesPerEpoch": 2,
    "checkpoint.endpointUrl": "https://other",
    "checkpoint.keepBest.metric": "digit-ink",
    "checkpoint.uri": "s3://other/runs",
    "packages": [{"uri": "s3://bucket/own-1.0-py3-none-any.whl", "sha256": "0" * 64}],
    "compute.extendedResources": {"rdma/ib": 1},
    "compute.rewardPods": [{"reward": "digit-ink"}],
    "compute.gpuResource": "amd.com/gpu",
    "compute.network.interface": "eth7",
    "compute.podTemplate.env": [{"name": "A", "value": "b"}],
    "compute.podTemplate.labels": {"a": "b"},
    "compute.podTemplate.annotations": {"a": "b"},
    "compute.podTemplate.nodeSelector": {"a": "b"},
    "compute.podTemplate.nodeRequirements": [{"key": "a", "operator": "Exists"}],
    "compute.podTemplate.tolerations": [{"operator": "Exists"}],
    "compute.podTemplate.volumes": [{"name": "a", "mountPath": "/a", "emptyDir": "1Gi"}],
    "data.prompts": ["a six"],
    "data.promptsConfigMap": None,  # goes with promptsFile
    "data.promptsFile": None,  # excludes prompts
    "evaluation.guidanceScale": 3.0,
    "evaluation.height": None,  # digits have one size
    "evaluation.width": None,
    "initFrom.mode": None,  # uri goes with it
    "managedBy": "example.com/other",
    "model.family": None,  # the picture's size and the source go with it
    "model.source": "s3://bucket/digits",
    "model.revision": None,  # of a hub id, which the builtin model is not
    "model.tuning": None,  # lora goes with it
    "modelCache.hostPath": "/models",
    "rewards": [{"name": "digit-contrast"}],
    "sampling.height": None,
    "sampling.sde": "dance",
    "sampling.tail.steps": 5,
    "sampling.trainingGuidanceScale": 3.0,
    "sampling.width": None,
}


# The digits family has no autoencoder, and the reward is not served, so a rule refuses these
# whatever the job's state is.
AGAINST_A_RULE = {"compute.tiledDecode", "compute.rewardPods"}
ALONE = [p for p in LEAVES if OTHER.get(p, "") is not None and p not in AGAINST_A_RULE]


def another(path: str, schema: Raw, old: object) -> object:
    """A value that the field does not have."""
    if path in OTHER:
        return OTHER[path]
    if "enum" in schema:
        return next(value for value in schema["enum"] if value != old)
    match schema["type"]:
        case "boolean":
            return not old
        case "integer":
            return (old if isinstance(old, int) else schema.get("minimum", 0)) + 1
        case "number":
            assert isinstance(old, int | float)
            return old / 2 if old else 0.5
        case "string":
            return "2Gi" if "Mi|Gi" in schema.get("pattern", "") and old != "2Gi" else "3"
        case "array":
            return ["other"]
    raise AssertionError(f"no other value for {path}: {schema}")


def with_value(job: Raw, path: str, value: object) -> Raw:
    changed = copy.deepcopy(job)
    *sections, last = path.split(".")
    block = changed["spec"]
    for section in sections:
        block = block.setdefault(section, {})
    block[last] = value
    return changed


def value_of(job: Raw, path: str) -> object:
    block: Any = job["spec"]
    for section in path.split("."):
        block = block.get(section, {}) if isinstance(block, dict) else {}
    return None if block == {} else block
