"""Every value of every option of the algorithm, against the plain version, and apart from others.

Two epochs of two updates each on a toy: the second update of an epoch is off-policy, and the
second epoch has another branch set where the epoch decides it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tempflow_api.errors import ManifestInvalid
from tempflow_api.rules import broken_rules
from tempflow_api.v1alpha1 import Advantage, Algorithm, BranchSet, JobSpec, Sampling, Tail
from tempflow_trainer import loop
from tempflow_trainer.algorithm.schedule import Schedule
from tests.numerics import schedules
from tests.numerics.plain import Plain
from tests.numerics.toys import FLOW_GRPO, Mlp, run_of, spec_of

Changes = dict[str, object]

BASE: Changes = {
    "data.prompts": ["a one", "a two"],
    "data.shuffle": False,
    "sampling.steps": 6,
    "algorithm.promptsPerEpoch": 2,
    "algorithm.updatesPerEpoch": 2,
    "algorithm.clipRange": 3e-3,
    # Far above the gradients of rounding, which Adam would otherwise blow up to whole steps.
    "optimizer.epsilon": 1e-2,
    "optimizer.learningRate": 0.05,
}
GUIDED: Changes = {"sampling.guidanceScale": 3.0, "sampling.negativePrompt": "not this"}
KL: Changes = {"algorithm.klCoefficient": 3.0}
FLOW: Changes = {**FLOW_GRPO, "algorithm.seedsPerPrompt": 3}
CPS: Changes = {"sampling.sde": "cps", "algorithm.weighting": "none", "algorithm.clipRange": 0.05}
NO_WEIGHTS: Changes = {"algorithm.weighting": "none"}


def branch_set(choose: str, count: int = 2) -> Changes:
    chosen: dict[str, object] = {"choose": choose, "count": count}
    if choose == "sliding":
        chosen["everyEpochs"] = 1
    return {"algorithm.branchSet": chosen}


@dataclass(frozen=True)
class Variant:
    """``changes`` on top of ``context``, whose parameters must be others."""

    name: str
    changes: Changes
    context: Changes = field(default_factory=dict)


VARIANTS = (
    Variant("another seed", {"algorithm.seed": 1}),
    Variant("method flow-grpo", FLOW),
    Variant("sde dance", {"sampling.sde": "dance"}),
    Variant("sde cps", CPS, NO_WEIGHTS),
    Variant("branch steps listed", {"algorithm.branchSteps": [0, 3]}),
    Variant("branch set first", branch_set("first")),
    Variant("branch set random", branch_set("random")),
    Variant("branch set window", branch_set("window")),
    Variant("branch set sliding", branch_set("sliding")),
    Variant("branch set of listed", branch_set("random", 1), {"algorithm.branchSteps": [1, 2, 4]}),
    Variant("merged steps", {"algorithm.mergeBelow": 0.5}),
    Variant("weighting none", NO_WEIGHTS),
    Variant("weighting guard", {"algorithm.weighting": "guard"}, NO_WEIGHTS),
    Variant("scope prompt", {"algorithm.advantage": {"scope": "prompt"}}),
    Variant("deviation global", {"algorithm.advantage": {"deviation": "global"}}),
    Variant("deviation none", {"algorithm.advantage": {"deviation": "none"}}),
    Variant("advantages cut", {"algorithm.advantage": {"clipMax": 0.5}}),
    Variant("kl exact", KL),
    Variant("kl no-dt", {"algorithm.klForm": "no-dt"}, KL),
    Variant("kl velocity", {"algorithm.klForm": "velocity"}, KL),
    Variant("guidance", GUIDED),
    Variant("guidance of training", {"sampling.trainingGuidanceScale": 1.0}, GUIDED),
    Variant("guidance in training only", {"sampling.trainingGuidanceScale": 3.0}),
    Variant("guidance gradient", {"algorithm.guidanceGradient": "conditional"}, GUIDED),
    Variant("tail of two steps", {"sampling.tail": {"steps": 2}}),
    Variant("tail of second order", {"sampling.tail": {"solver": "dpm2"}}),
    Variant(
        "tail of three steps of second order",
        {"sampling.tail": {"solver": "dpm2", "steps": 3}},
        {"sampling.tail": {"steps": 3}},
    ),
    Variant("clip range", {"algorithm.clipRange": 1e-4}),
    Variant("flow-grpo sde dance", {"sampling.sde": "dance"}, FLOW),
    Variant("flow-grpo sde cps", {"sampling.sde": "cps", "algorithm.clipRange": 0.05}, FLOW),
    Variant("flow-grpo with weights", {"algorithm.weighting": "noise-aware"}, FLOW),
    Variant("flow-grpo guard", {"algorithm.weighting": "guard"}, FLOW),
    Variant("flow-grpo fixed window", branch_set("first"), FLOW),
    Variant("flow-grpo sliding window", branch_set("sliding"), FLOW),
    Variant("flow-grpo random window", branch_set("window"), FLOW),
    Variant("flow-grpo scattered steps", branch_set("random"), FLOW),
    Variant(
        "flow-grpo window of shared starts",
        {"algorithm.branchesPerSeed": 3, "algorithm.advantage": {"scope": "seed"}},
        {**FLOW, **branch_set("window")},
    ),
    Variant(
        "flow-grpo window of one step",
        {"algorithm.branchesPerSeed": 3, "algorithm.advantage": {"scope": "seed"}},
        {**FLOW, **branch_set("window", 1)},
    ),
    Variant("flow-grpo merged steps", {"algorithm.mergeBelow": 0.5}, FLOW),
    Variant(
        "flow-grpo short tail",
        {"sampling.tail": {"steps": 1}},
        {**FLOW, **branch_set("first", 2)},
    ),
    Variant(
        "flow-grpo tail of second order",
        {"sampling.tail": {"solver": "dpm2"}},
        {**FLOW, **branch_set("first", 2)},
    ),
    Variant("cps with kl", {**KL, "algorithm.klForm": "velocity"}, CPS),
    Variant("cps with exact kl", KL, CPS),
    Variant("dance with guard", {"algorithm.weighting": "guard"}, {"sampling.sde": "dance"}),
    Variant(
        "merged steps and kl", {**KL, "algorithm.klForm": "no-dt"}, {"algorithm.mergeBelow": 0.5}
    ),
)


def spec_with(*changes: Changes) -> JobSpec:
    merged: Changes = dict(BASE)
    for part in changes:
        merged |= part
    spec = spec_of(merged)
    # The rule about the digits family's guidance and sizes holds for the toy as well.
    assert broken_rules(spec) == []
    return spec


def trained(spec: JobSpec, family: Callable[[int], Schedule] = schedules.sd3) -> Tensor:
    run = run_of(spec, Mlp(schedule_of=family, guided=True))
    for epoch in range(2):
        loop.run_epoch(run, epoch)
    assert run.updates_done == 4
    return torch.cat([p.detach().flatten() for p in run.tuning.parameters().values()])


@cache
def trained_as(context: str) -> Tensor:
    return trained(spec_with(_CONTEXTS[context]))


_CONTEXTS = {repr(variant.context): variant.context for variant in VARIANTS}
START = torch.cat([p.detach().flatten() for p in Mlp(guided=True).transformer.parameters()])


@pytest.mark.parametrize("variant", VARIANTS, ids=[variant.name for variant in VARIANTS])
def test_a_variant_learns_what_its_plain_version_learns(variant: Variant) -> None:
    spec = spec_with(variant.context, variant.changes)
    found = trained(spec)
    plain = Plain(spec, Mlp(guided=True))
    for epoch in range(2):
        plain.epoch(epoch)
    torch.testing.assert_close(found.double(), plain.weights(), rtol=0, atol=1e-5)
    moved = (found - START).abs().max()
    apart = (found - trained_as(repr(variant.context))).abs().max()
    # What was compared is a hundred times the tolerance, and not that of the context.
    assert moved > 1e-3
    assert apart > 1e-4


ON_EVERY_SCHEDULE = (
    "another seed",
    "method flow-grpo",
    "sde dance",
    "sde cps",
    "merged steps",
    "kl no-dt",
    "flow-grpo guard",
)


@pytest.mark.parametrize("family", [schedules.flux, schedules.qwen])
@pytest.mark.parametrize("name", ON_EVERY_SCHEDULE)
def test_so_it_is_on_the_schedules_of_the_other_families(
    name: str, family: Callable[[int], Schedule]
) -> None:
    """The table is of Stable Diffusion 3's; what depends on the schedule is here on the others."""
    variant = next(found for found in VARIANTS if found.name == name)
    spec = spec_with(variant.context, variant.changes)
    found, plain = trained(spec, family), Plain(spec, Mlp(schedule_of=family, guided=True))
    for epoch in range(2):
        plain.epoch(epoch)
    torch.testing.assert_close(found.double(), plain.weights(), rtol=0, atol=1e-5)
    assert (found - START).abs().max() > 1e-3
    assert (found - trained(spec)).abs().max() > 1e-4


def values(section: type[Any], name: str) -> set[str]:
    return set(get_args(section.model_fields[name].annotation))


def test_the_table_has_every_value_of_every_option() -> None:
    specs = [spec_with(variant.context, variant.changes) for variant in VARIANTS]
    algorithms, samplings = [spec.algorithm for spec in specs], [spec.sampling for spec in specs]
    seen = {
        (Algorithm, "method"): {a.method for a in algorithms},
        (Algorithm, "weighting"): {a.weighting for a in algorithms},
        (Algorithm, "kl_form"): {a.kl_form for a in algorithms},
        (Algorithm, "guidance_gradient"): {a.guidance_gradient for a in algorithms},
        (Advantage, "scope"): {a.advantage.scope for a in algorithms},
        (Advantage, "deviation"): {a.advantage.deviation for a in algorithms},
        (BranchSet, "choose"): {a.branch_set.choose for a in algorithms},
        (Sampling, "sde"): {s.sde for s in samplings},
        (Tail, "solver"): {s.tail.solver for s in samplings},
    }
    for (section, name), found in seen.items():
        assert found == values(section, name), name


def test_a_model_that_guides_itself_has_no_unconditional_velocity_to_leave_out() -> None:
    spec = spec_with(GUIDED, {"algorithm.guidanceGradient": "conditional"})
    with pytest.raises(ManifestInvalid, match=r"guidanceGradient: is both for builtin:digits"):
        run_of(spec, Mlp(guided=False))
