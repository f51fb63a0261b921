"""Rules about the method: which steps, draws, weights and guidance mean something together."""

from tempflow_api.method import Advantage, BranchSet, Tail
from tempflow_api.rule import Rule
from tempflow_api.v1alpha1 import JobSpec


def _branch_steps_inside(spec: JobSpec) -> bool:
    return all(step < spec.sampling.steps - 1 for step in spec.algorithm.branch_steps)


def _enough_candidates(spec: JobSpec) -> bool:
    algorithm = spec.algorithm
    candidates = len(algorithm.branch_steps) or spec.sampling.steps - 1
    return algorithm.branch_set.choose == "all" or algorithm.branch_set.count <= candidates


def _whole_flow_grpo(spec: JobSpec) -> bool:
    """Its trajectories have start noises of their own and share nothing."""
    algorithm = spec.algorithm
    return algorithm.method == "flow-grpo" and algorithm.branch_set.choose == "all"


def _draws_to_compare(spec: JobSpec) -> bool:
    algorithm = spec.algorithm
    by_prompt = algorithm.advantage.scope == "prompt" or _whole_flow_grpo(spec)
    seeds = algorithm.seeds_per_prompt if by_prompt else 1
    return seeds * algorithm.branches_per_seed >= 2


def _density_where_needed(spec: JobSpec) -> bool:
    return spec.sampling.sde != "cps" or spec.algorithm.weighting == "none"


def _guidance_to_stop_the_gradient_of(spec: JobSpec) -> bool:
    sampling = spec.sampling
    training = sampling.training_guidance_scale or sampling.guidance_scale
    guided = spec.model.family != "flux" and training > 1
    return spec.algorithm.guidance_gradient == "both" or guided


def _tail_to_solve(spec: JobSpec) -> bool:
    """Nothing is left where all steps but the last are stochastic in one trajectory."""
    whole = _whole_flow_grpo(spec) and not spec.algorithm.branch_steps
    return not whole or spec.sampling.tail == Tail()


_COUNT, _EVERY_EPOCHS = BranchSet().count, BranchSet().every_epochs
_EPSILON = Advantage().epsilon
_WHOLE_FLOW_GRPO = (
    "(self.algorithm.method == 'flow-grpo' && self.algorithm.branchSet.choose == 'all')"
)

METHOD_RULES: tuple[Rule, ...] = (
    Rule(
        "spec.algorithm.branchSteps",
        "self.algorithm.branchSteps.all(k, k < self.sampling.steps - 1)",
        "each is less than sampling.steps - 1: the last step has almost no noise, its likelihood "
        "overflows",
        _branch_steps_inside,
    ),
    Rule(
        "spec.algorithm.branchSteps",
        "self.algorithm.branchSteps.all(k, self.algorithm.branchSteps.exists_one(j, j == k))",
        "no step is listed twice",
        lambda spec: len(set(spec.algorithm.branch_steps)) == len(spec.algorithm.branch_steps),
    ),
    Rule(
        "spec.algorithm.branchSet.count",
        "self.algorithm.branchSet.choose == 'all' || self.algorithm.branchSet.count <= "
        "(size(self.algorithm.branchSteps) > 0 ? size(self.algorithm.branchSteps) "
        ": self.sampling.steps - 1)",
        "is at most the number of candidates: those of branchSteps, or sampling.steps - 1",
        _enough_candidates,
    ),
    # A value that would do nothing. One that is the default cannot be told from one left out.
    Rule(
        "spec.algorithm.branchSet.count",
        f"self.algorithm.branchSet.choose != 'all' || self.algorithm.branchSet.count == {_COUNT}",
        "is left out with choose: all, which takes every candidate",
        lambda spec: (
            spec.algorithm.branch_set.choose != "all" or spec.algorithm.branch_set.count == _COUNT
        ),
    ),
    Rule(
        "spec.algorithm.branchSet.everyEpochs",
        "self.algorithm.branchSet.choose == 'sliding' || "
        f"self.algorithm.branchSet.everyEpochs == {_EVERY_EPOCHS}",
        "is left out unless choose is sliding: no other set moves on after so many epochs",
        lambda spec: (
            spec.algorithm.branch_set.choose == "sliding"
            or spec.algorithm.branch_set.every_epochs == _EVERY_EPOCHS
        ),
    ),
    Rule(
        "spec.algorithm.advantage.epsilon",
        "self.algorithm.advantage.deviation != 'none' || "
        f"self.algorithm.advantage.epsilon == {_EPSILON}",
        "is left out with deviation none: there is no deviation to add it to",
        lambda spec: (
            spec.algorithm.advantage.deviation != "none"
            or spec.algorithm.advantage.epsilon == _EPSILON
        ),
    ),
    Rule(
        "spec.algorithm.klForm",
        "self.algorithm.klCoefficient > 0.0 || self.algorithm.klForm == 'exact'",
        "is left out where klCoefficient is 0: no divergence is computed then",
        lambda spec: spec.algorithm.kl_coefficient > 0 or spec.algorithm.kl_form == "exact",
    ),
    Rule(
        "spec.sampling.tail",
        f"!{_WHOLE_FLOW_GRPO} || size(self.algorithm.branchSteps) > 0 || "
        "(self.sampling.tail.solver == 'euler' && "
        f"self.sampling.tail.steps == {Tail().steps})",
        "is left out where flow-grpo draws at all steps: one step is left after the last of them",
        _tail_to_solve,
    ),
    Rule(
        "spec.algorithm.branchesPerSeed",
        f"!{_WHOLE_FLOW_GRPO} || self.algorithm.branchesPerSeed == 1",
        "is 1 with method flow-grpo, which does not branch: its group size is seedsPerPrompt "
        "(with a branchSet other than all, draws share the steps before the first stochastic one)",
        lambda spec: not _whole_flow_grpo(spec) or spec.algorithm.branches_per_seed == 1,
    ),
    Rule(
        "spec.algorithm.advantage.scope",
        f"!{_WHOLE_FLOW_GRPO} || self.algorithm.advantage.scope == 'prompt'",
        "is prompt with method flow-grpo: its trajectories share no start noise to compare within",
        lambda spec: not _whole_flow_grpo(spec) or spec.algorithm.advantage.scope == "prompt",
    ),
    Rule(
        "spec.algorithm.branchesPerSeed",
        f"(self.algorithm.advantage.scope == 'prompt' || {_WHOLE_FLOW_GRPO} "
        "? self.algorithm.seedsPerPrompt : 1) "
        "* self.algorithm.branchesPerSeed >= 2",
        "a group needs two draws to compare: branchesPerSeed (times seedsPerPrompt with scope "
        "prompt) is at least 2",
        _draws_to_compare,
    ),
    Rule(
        "spec.algorithm.weighting",
        "self.sampling.sde != 'cps' || self.algorithm.weighting == 'none'",
        "is none with sde cps: its log-probability leaves out the division by the variance and so "
        "already counts every step by its noise",
        _density_where_needed,
    ),
    Rule(
        "spec.algorithm.klForm",
        "self.sampling.sde != 'cps' || self.algorithm.klForm != 'no-dt'",
        "is exact or velocity with sde cps, whose noise is no diffusion times sqrt(|dt|)",
        lambda spec: spec.sampling.sde != "cps" or spec.algorithm.kl_form != "no-dt",
    ),
    Rule(
        "spec.algorithm.mergeBelow",
        "self.sampling.sde != 'cps' || self.algorithm.mergeBelow == 0.0",
        "is 0 with sde cps, whose noise shrinks with the length of a step",
        lambda spec: spec.sampling.sde != "cps" or spec.algorithm.merge_below == 0,
    ),
    Rule(
        "spec.algorithm.mergeBelow",
        "self.algorithm.mergeBelow == 0.0 || self.algorithm.mergeBelow < self.sampling.noiseLevel",
        "is less than sampling.noiseLevel, which the first step adds with sde flow and no step "
        "reaches with dance",
        lambda spec: (
            spec.algorithm.merge_below == 0
            or spec.algorithm.merge_below < spec.sampling.noise_level
        ),
    ),
    Rule(
        "spec.sampling.tail.steps",
        "self.sampling.tail.solver != 'dpm2' || "
        "(self.sampling.tail.steps >= 3 && self.sampling.steps >= 4)",
        "is at least 3 with solver dpm2, and sampling.steps at least 4: the first and the last "
        "step of a tail are of first order",
        lambda spec: (
            spec.sampling.tail.solver != "dpm2"
            or (spec.sampling.tail.steps >= 3 and spec.sampling.steps >= 4)
        ),
    ),
    Rule(
        "spec.sampling.noiseLevel",
        "self.sampling.sde != 'cps' || self.sampling.noiseLevel <= 1.0",
        "is at most 1 with sde cps: all noise of the step is fresh then",
        lambda spec: spec.sampling.sde != "cps" or spec.sampling.noise_level <= 1,
    ),
    Rule(
        "spec.algorithm.guidanceGradient",
        "self.algorithm.guidanceGradient == 'both' || (self.model.family != 'flux' && "
        "(has(self.sampling.trainingGuidanceScale) ? self.sampling.trainingGuidanceScale "
        ": self.sampling.guidanceScale) > 1.0)",
        "is both without classifier-free guidance in training (family flux, or a scale of 1): "
        "there is no unconditional velocity",
        _guidance_to_stop_the_gradient_of,
    ),
)
