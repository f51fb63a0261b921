"""Before the first epoch: the real model, at the run's shapes and precision, does what the loss
takes for granted.

A ratio is only a ratio if the same weights give the same log-probability, in the rollout and in the
update, and however many rows a call has. Two start noises are walked; the log-probabilities of
their draws, as the noise that made them tells, are compared with those of the update's forward in
the same calls, in its own micro-batches, in calls as full as a rollout's, and alone. An image is
scored; and one optimizer step is taken and taken back. No generator, counter, weight or moment is
different afterwards, to the last bit.
"""

import copy
import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import SelfTestFailed
from tempflow_api.record import SelfTest
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import experience as ex
from tempflow_trainer import seeds, sharding
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.experience import Experience
from tempflow_trainer.loop import Run
from tempflow_trainer.metrics import Record, now
from tempflow_trainer.models.base import Conditioning, Policy
from tempflow_trainer.rewards.base import Reward
from tempflow_trainer.scoring import Scoring

log = logging.getLogger(__name__)


def configuration_of(spec: JobSpec) -> str:
    """A digest of what the result depends on: the same one need not be tested again."""
    said = spec.model_dump_json(by_alias=True, include={"model", "sampling", "rewards", "compute"})
    text = f"{said}/{spec.algorithm.clip_range}/{spec.self_test}/{torch.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()


def once(
    run: Run, reward: Reward, spec: JobSpec, record: Record, store: Callable[[], None]
) -> None:
    """Examine a configuration that was not examined before; ``store`` sends the report away.

    Raises:
        SelfTestFailed: on every rank, when something is beyond its bound.
    """

    def known() -> bool:
        report = record.read(layout.SELF_TEST, SelfTest)
        same = report is not None and report.configuration == configuration_of(spec)
        return bool(report and same and problem(report) is None)

    def keep() -> str:
        record.write(layout.SELF_TEST, report.model_dump_json(by_alias=True, indent=1))
        store()
        log.info(
            "self-test %s: log-probabilities differ by %s between rollout and update, by %.2g "
            "in calls as full as the rollout's, by %.2g for one row alone (at most %.2g)",
            "failed" if found else "passed",
            "?" if report.rollout_difference is None else f"{report.rollout_difference:.2g}",
            report.full_call_difference,
            report.one_row_difference,
            report.bound,
        )
        return ""

    if not spec.self_test.enabled or run.ranks.agreed(known):
        return
    with run.clock("self-test"):
        report = examine(run, reward, spec)
    found = problem(report)
    run.ranks.on_first(keep)
    if found:
        raise SelfTestFailed(f"self-test: {found}")


@dataclass(frozen=True)
class _Probe:
    """Start noises of this rank, walked: rows as an update sees them."""

    rows: Experience
    walked_BK: Tensor
    """The draws' log-probabilities as the rollout made them."""
    policy: Policy
    conditioning: Conditioning
    reward: float | None
    """None where a score that is not required is missing."""


def examine(run: Run, reward: Reward, spec: JobSpec) -> SelfTest:
    """The report, the same on every rank; each rank tests its own device.

    Raises:
        RewardFailed: a scorer that fails, or whose score is not finite.
        Preempted: on every rank, when one was asked to stop while a reward scored.
    """
    began = time.perf_counter()
    probe = _walk(run, reward)
    trained_BK = _by_training(run, probe)
    differences = [
        _walked(run, probe),
        _in_full_calls(run, probe, trained_BK),
        _alone(run, probe, trained_BK),
    ]
    with_gradient, changed = _step(run, probe)
    found = torch.tensor(differences, dtype=torch.float64)
    worst = torch.stack(run.ranks.gather_rows(found)).amax(dim=0).tolist()
    counts = torch.stack(run.ranks.gather_rows(torch.tensor([with_gradient, changed])))
    # A rank that holds parts may have none of a small tensor.
    reached, moved = (counts.amax(dim=0) if run.tuning.sharded else counts.amin(dim=0)).tolist()
    bound = spec.self_test.log_prob_tolerance * spec.algorithm.clip_range
    parameters = sum(p.numel() for p in run.tuning.parameters().values())
    return SelfTest(
        configuration=configuration_of(spec),
        time=now(),
        seconds=time.perf_counter() - began,
        device=str(run.policy.device),
        precision=spec.model.precision,
        trained_parameters=parameters,
        tensors_with_gradient=reached,
        tensors_changed=moved,
        reward=probe.reward,
        rollout_difference=worst[0] if _same_policy(run) else None,
        full_call_difference=worst[1],
        one_row_difference=worst[2],
        bound=bound,
    )


def problem(report: SelfTest) -> str | None:
    """What keeps the run from starting, with the remedy; None if nothing."""
    if report.trained_parameters == 0:
        return "no parameter is trained: spec.model.lora.targets or spec.model.tuning"
    if report.tensors_with_gradient == 0 or report.tensors_changed == 0:
        return (
            f"an optimizer step changes {report.tensors_changed} of the trained tensors and "
            f"{report.tensors_with_gradient} have a gradient: the trained weights do not reach "
            "the velocity; check spec.model.lora.targets and spec.optimizer.learningRate"
        )
    walked, bound = report.rollout_difference, report.bound
    if walked is not None and not walked <= bound:  # also if it is not a number
        return (
            f"the rollout's and the update's log-probability differ by {walked:.2g} under the same "
            f"weights in calls of the same size, at most {bound:.2g} is allowed: what is trained "
            "is not what has drawn. If spec.model.precision is float32 this is a fault of the "
            "model's adapter; if not, spec.selfTest.logProbTolerance sets the bound"
        )
    for what, value in (
        ("calls as full as the rollout's", report.full_call_difference),
        ("calls of one row", report.one_row_difference),
    ):
        if not value <= bound:
            return (
                f"log-probabilities in {what} and in those of the update differ by {value:.2g} "
                f"under the same weights, at most {bound:.2g} is allowed: the velocity depends on "
                "the rows beside it. Take spec.model.precision: float32, or "
                "spec.compute.rowsPerCall equal to rowsPerTrainingCall, or a larger "
                "spec.algorithm.clipRange; spec.selfTest.logProbTolerance sets the bound"
            )
    return None


def _walk(run: Run, reward: Reward) -> _Probe:
    # One stochastic trajectory passes a state and a draw at every branch step, for T evaluations.
    # Two of them, of other prompts where there are any, tell whether a row has its own prompt.
    shares = run.order.shares(0, rank=run.ranks.rank, world=run.ranks.world)
    groups = [group for share in shares for group in share]
    prompts = [group.prompt for group in (groups[0], groups[-1])[: len(groups)]]
    policy = replace(run.policy, evaluations=dict.fromkeys(run.policy.evaluations, 0))
    walker = replace(run.walker, policy=policy)
    plan = run.exploration.trajectory(0)

    def noise(*what: str | int) -> Tensor:
        one = (run.latent_shape, run.run_seed, "self-test", run.ranks.rank)
        return torch.stack([seeds.normal(*one, place, *what) for place in range(len(prompts))])

    conditioning = policy.text.encode([prompt.text for prompt in prompts])
    rollouts = walker.collect(
        plan, noise("start"), conditioning, lambda step: noise("branch", step)[:, None]
    )
    # A scorer that compares needs something to compare.
    copies = 2 if reward.group_wise else 1
    with torch.no_grad():
        images = policy.decode(rollouts.latents_NCHW[:1]).expand(copies, -1, -1, -1)
    scoring = Scoring([term.name for term in reward.terms], run.ranks, run.stop_requested)
    scoring.submit(
        copies,
        lambda on_call: reward.score(
            images,
            [prompts[0].text] * copies,
            [prompts[0].metadata] * copies,
            groups=[0] * copies,
            held_out=True,
            on_call=on_call,
        ),
    )
    scores = scoring.wait()
    advantages_GSK = torch.ones(len(prompts), len(plan.steps), 1)
    rows = ex.of_rollouts(rollouts, advantages_GSK, plan, walker, run.exploration.weights_S(plan))
    total = float(reward.total(scores)[0])
    return _Probe(
        rows,
        _of_noise_BK(run, plan, torch.stack([noise("branch", step) for step in plan.steps], 1)),
        policy,
        conditioning,
        total if math.isfinite(total) else None,
    )


def _of_noise_BK(run: Run, plan: BranchPlan, noise_GSCHW: Tensor) -> Tensor:
    """Log-probabilities of draws by the noise that the job's steps add, [G S, 1].

    Neither a velocity nor a row is read, so whatever differs between the walk and the update shows.
    """
    std_S = run.exploration.transitions(plan).noise_std_S
    added_GSCHW = std_S.float()[:, None, None, None] * noise_GSCHW
    found_GS = run.objective.log_prob(added_GSCHW, torch.zeros_like(added_GSCHW), std_S)
    return found_GS.flatten()[:, None]


def _log_probs_BK(run: Run, probe: _Probe, rows: Experience) -> Tensor:
    found = run.objective.predict(rows, probe.policy, probe.conditioning, purpose="training")
    return run.objective.log_probs_BK(rows, found.mean_BCHW).detach().cpu()


def _by_training(run: Run, probe: _Probe) -> Tensor:
    """As the update computes them, with gradient, in its micro-batches."""
    batches = probe.rows.micro_batches(run.rows_per_training_call)
    return torch.cat([_log_probs_BK(run, probe, batch) for batch in batches])


def _same_policy(run: Run) -> bool:
    """Whether the rollout draws from the policy that is trained: guidance may differ."""
    return run.policy.scale("training") == run.policy.scale("rollout")


@torch.no_grad()
def _walked(run: Run, probe: _Probe) -> float:
    """Most that the walk's log-probabilities differ from the update's forward in calls like the
    walk's: a step's rows at a time."""
    calls = [
        index_B
        for step in probe.rows.branch_B.unique()
        for index_B in (probe.rows.branch_B == step)
        .nonzero()
        .flatten()
        .split(run.walker.rows_per_call)
    ]
    parts = [
        _log_probs_BK(run, probe, probe.rows.rows(index_B)) - probe.walked_BK[index_B]
        for index_B in calls
    ]
    return float(torch.cat(parts).abs().max())


@torch.no_grad()
def _in_full_calls(run: Run, probe: _Probe, expected_BK: Tensor) -> float:
    """Most that log-probabilities differ in a call as full as those of a rollout."""
    shares = run.order.shares(0, rank=run.ranks.rank, world=run.ranks.world)
    live = sum(map(len, shares)) * (run.exploration.plan(0).images_per_group + 1)
    count = max(min(run.walker.rows_per_call, live), len(probe.rows))
    index_B = torch.arange(count) % len(probe.rows)
    parts = [
        _log_probs_BK(run, probe, probe.rows.rows(index)) - expected_BK[index]
        for index in index_B.split(run.walker.rows_per_call)
    ]
    return float(torch.cat(parts).abs().max())


@torch.no_grad()
def _alone(run: Run, probe: _Probe, expected_BK: Tensor) -> float:
    """Most that they differ in calls of one row: at the first, a middle and the last step."""
    middle = int(probe.rows.branch_B.max()) // 2
    rows = [torch.tensor([i]) for i in sorted({0, middle, len(probe.rows) - 1})]
    parts = [_log_probs_BK(run, probe, probe.rows.rows(i)) - expected_BK[i] for i in rows]
    return float(torch.cat(parts).abs().max())


def _step(run: Run, probe: _Probe) -> tuple[int, int]:
    """How many trained tensors have a gradient and how many of these one optimizer step changes;
    weights, moments and gradients are put back."""
    parameters = run.tuning.parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    moments = copy.deepcopy(run.optimizer.state_dict())
    try:
        batch = next(probe.rows.micro_batches(run.rows_per_training_call))
        found = run.objective.loss_sums(batch, probe.policy, probe.conditioning, run.tuning)
        if not found["policy"].requires_grad:
            return 0, 0
        # As in an update: half precision has no room for gradients of a mean over a latent.
        scale = 2.0 ** round(math.log2(math.prod(run.latent_shape))) if run.half_range else 1.0
        (found["policy"] * scale).backward()
        reached = [n for n, p in parameters.items() if p.grad is not None and _any(p.grad)]
        run.optimizer.step()
        changed = [n for n in reached if _any(before[n] - parameters[n].detach())]
        return len(reached), len(changed)
    finally:
        run.tuning.assign(before)
        run.optimizer.load_state_dict(moments)
        for parameter in parameters.values():
            parameter.grad = None


def _any(tensor: Tensor) -> bool:
    """Whether this rank's part of a tensor has a number other than zero."""
    return bool(sharding.part(tensor).any())
