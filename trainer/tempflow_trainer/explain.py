"""What a run will do, before it does it: what ``tempflow explain`` starts.

Reads a resolved job as JSON on standard input and writes an ``Explanation`` as JSON. No weight is
loaded and no number of a model is computed; the counts come from the very plan, walker, schedule
and loss of a run.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from tempflow_api.errors import ManifestInvalid, Problem, TempFlowError
from tempflow_api.explanation import (
    Evaluations,
    Explanation,
    Flops,
    Geometry,
    Groups,
    MemoryBytes,
    ScheduleStep,
    Seconds,
)
from tempflow_api.v1alpha1 import Compute, JobSpec, TempFlowGRPOJob
from tempflow_trainer.algorithm import sde, weighting
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.algorithm.exploration import Exploration
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.data import Prompt, PromptOrder
from tempflow_trainer.footprint import Cost, Footprint, weight_bytes
from tempflow_trainer.main import (
    groups_per_rollout,
    objective_of,
    read_job_text,
    require_guidance,
    set_memory_savers,
    tuning_of,
)
from tempflow_trainer.models.base import Conditioning, FlowModel, Policy
from tempflow_trainer.models.skeleton import Skeleton, skeleton
from tempflow_trainer.models.tuning import Tuning
from tempflow_trainer.rollout import Walker

FLOAT32 = 4
MOMENTS = 2
RATE = re.compile(r"^([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(TFLOP/s|/s)$")


class _Counting(FlowModel):
    """Latents of one number: a walk over them makes the calls of a run and computes nothing."""

    classifier_free = False
    lora_targets = ()

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.calls = 0
        self.rows_at: dict[float, int] = {}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        del height, width
        return 1, 1, 1

    def schedule(self, steps: int, height: int, width: int) -> Schedule:
        del steps, height, width
        return self._schedule

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        del prompts
        return Conditioning({})

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        del conditioning
        level = float(sigma_B[0])
        self.calls += 1
        self.rows_at[level] = self.rows_at.get(level, 0) + len(latents_BCHW)
        return torch.zeros_like(latents_BCHW)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW


@dataclass(frozen=True)
class Walked:
    """A rollout as it was counted."""

    evaluations: int
    calls: int
    most_rows: int
    """At a denoising step."""
    images: int


def walk(schedule: Schedule, plan: BranchPlan, groups: int, rows_per_call: int) -> Walked:
    """Roll ``plan`` out for so many start noises, and count."""
    model = _Counting(schedule)
    policy = Policy(model, 1.0, None, torch.device("cpu"), text=model)
    starts = torch.zeros(groups, 1, 1, 1)
    rollouts = Walker(policy, schedule, 1.0, rows_per_call).collect(
        plan, starts, Conditioning({}), lambda _step: torch.zeros(groups, plan.draws, 1, 1, 1)
    )
    rows, most = policy.evaluations["rollout"], max(model.rows_at.values())
    return Walked(rows, model.calls, most, len(rollouts.latents_NCHW))


@dataclass(frozen=True)
class Method:
    """The algorithm of a job on its model's schedule."""

    spec: JobSpec
    schedule: Schedule
    exploration: Exploration
    plan: BranchPlan
    """Of the first epoch; others may branch elsewhere, and a trajectory of ``flow-grpo`` whose
    steps are merged at fewer or more steps."""

    @classmethod
    def of(cls, spec: JobSpec, model: FlowModel) -> "Method":
        """As ``main.build_run`` makes it."""
        sampling = spec.sampling
        schedule = model.schedule(sampling.steps, sampling.height, sampling.width)
        exploration = Exploration(spec.algorithm, sampling, schedule)
        return cls(spec, schedule, exploration, exploration.plan(0))

    @property
    def groups_total(self) -> int:
        """Start noises of an epoch."""
        return self.spec.algorithm.prompts_per_epoch * self.spec.algorithm.seeds_per_prompt

    def steps(self) -> tuple[list[ScheduleStep], float]:
        """The schedule, and the factor that brings the weights to a mean of 1."""
        sampling, branched = self.spec.sampling, list(self.plan.steps)
        kind = self.spec.algorithm.weighting
        every = sde.transitions(sampling.sde, self.schedule, sampling.noise_level)
        jumps = self.exploration.transitions(self.plan)
        noise_T, raw_T = every.noise_std_S.clone(), weighting.raw_S(kind, every).clone()
        noise_T[branched], raw_T[branched] = jumps.noise_std_S, weighting.raw_S(kind, jumps)
        weight_T = torch.zeros_like(noise_T)
        weight_T[branched] = self.exploration.weights_S(self.plan)
        sigmas = self.schedule.sigmas
        next_T = sigmas[1:].clone()
        next_T[branched] = sigmas[list(self.plan.landings)]
        steps = [
            ScheduleStep(
                step=k,
                sigma=float(sigmas[k]),
                sigma_next=float(next_T[k]),
                dt=float(next_T[k] - sigmas[k]),
                noise_std=float(noise_T[k]),
                weight_raw=float(raw_T[k]),
                weight=float(weight_T[k]),
                branched=k in self.plan.steps,
            )
            for k in range(self.schedule.steps)
        ]
        first = self.plan.steps[0]
        return steps, float(weight_T[first] / raw_T[first])

    def groups(self) -> Groups:
        algorithm = self.spec.algorithm
        by_prompt = algorithm.advantage.scope == "prompt"
        return Groups(
            prompts=algorithm.prompts_per_epoch,
            seeds=algorithm.seeds_per_prompt,
            total=self.groups_total,
            steps=len(self.plan.steps),
            draws=self.plan.draws,
            compared=self.plan.draws * (algorithm.seeds_per_prompt if by_prompt else 1),
        )

    def evaluations(self, rows_per_velocity: Callable[[str], int]) -> Evaluations:
        """``rows_per_velocity`` by purpose."""
        algorithm, plan = self.spec.algorithm, self.plan
        walked = walk(self.schedule, plan, 1, self.spec.compute.rows_per_call)
        followed = plan.trunk_follows_draw and plan.draws == 1
        trunk = walked.evaluations if followed else plan.trunk_evaluations
        rows = self.groups_total * rows_per_velocity("rollout")
        differentiated = self.groups_total * rows_per_velocity("training") * plan.rows_per_group
        before = differentiated if algorithm.updates_per_epoch > 1 else 0
        reference = differentiated if algorithm.kl_coefficient > 0 else 0
        rollout = rows * walked.evaluations
        return Evaluations(
            trunk=rows * trunk,
            tails=rollout - rows * trunk,
            training=differentiated + before,
            without_gradient=before,
            reference=reference,
            total=rollout + differentiated + before + reference,
            forward_equivalents=rollout + 3 * differentiated + before + reference,
        )

    def geometry(self) -> Geometry:
        """The shares that ``PromptOrder`` deals; they differ by a start noise or so."""
        algorithm, compute = self.spec.algorithm, self.spec.compute
        world = compute.nodes * compute.processes_per_node
        order = PromptOrder(
            [Prompt(0, "", {})],
            algorithm.prompts_per_epoch,
            algorithm.seeds_per_prompt,
            algorithm.updates_per_epoch,
            shuffle=False,
            run_seed=0,
        )
        shares = [
            [len(share) for share in order.shares(0, rank=rank, world=world)]
            for rank in range(world)
        ]
        most = max(shares, key=sum)
        rows = max(most) * self.plan.rows_per_group
        at_once = min(groups_per_rollout(self.spec, world) or sum(most), sum(most))
        parts = [at_once] * (sum(most) // at_once)
        parts += [sum(most) % at_once] if sum(most) % at_once else []
        by_size = {
            size: walk(self.schedule, self.plan, size, compute.rows_per_call) for size in set(parts)
        }
        return Geometry(
            processes=world,
            groups_least=min(map(sum, shares)),
            groups_most=sum(most),
            updates=algorithm.updates_per_epoch,
            rows_per_update=rows,
            micro_batches_per_update=-(-rows // compute.rows_per_training_call),
            groups_per_rollout=at_once,
            rows_in_flight=by_size[at_once].most_rows,
            rollout_calls=sum(by_size[size].calls for size in parts),
            images=sum(by_size[size].images for size in parts),
        )


def explain(job: TempFlowGRPOJob, rate: str | None = None) -> Explanation:
    """What a run of ``job`` will do.

    ``rate`` is what a process computes: ``400TFLOP/s``, or ``90/s`` rows of the network without
    gradient.

    Raises:
        ModelUnavailable: no configuration of the model can be found.
        ManifestInvalid: a rate that is not one, or guidance that the model does not have.
    """
    spec = job.spec
    asked = _rate_of(rate) if rate else None
    bones = skeleton(spec.model)
    require_guidance(spec, bones.model)
    method = Method.of(spec, bones.model)
    set_memory_savers(spec, bones.model)
    tuning = tuning_of(spec, bones.model)
    footprint = Footprint.of(
        bones,
        tuning,
        spec,
        bones.model.latent_shape(spec.sampling.height, spec.sampling.width),
    )
    evaluations = method.evaluations(footprint.rows_per_velocity)
    geometry, (steps, normaliser) = method.geometry(), method.steps()
    calls = Calls.of(method, footprint, geometry)
    images = method.groups_total * method.plan.images_per_group
    flops = _flops(calls, evaluations, images)
    trajectories = _trajectories(footprint, method.plan, geometry)
    transformer = bones.model.transformer
    return Explanation(
        name=job.metadata.name,
        model=spec.model.source,
        method=spec.algorithm.method,
        weighting=spec.algorithm.weighting,
        width=spec.sampling.width,
        height=spec.sampling.height,
        parameters=sum(p.numel() for n, p in transformer.named_parameters() if "lora_" not in n),
        trained_parameters=sum(p.numel() for p in tuning.parameters().values()),
        schedule=steps,
        weight_normaliser=normaliser,
        groups=method.groups(),
        evaluations=evaluations,
        images_scored=images,
        geometry=geometry,
        memory_bytes=_memory(calls, tuning, bones, spec.compute, trajectories),
        flops=flops,
        seconds=_seconds(asked, flops, geometry.processes) if asked else None,
    )


@dataclass(frozen=True)
class Calls:
    """The largest calls of a run, each with its operations and memory."""

    forward: Cost
    forward_rows: int
    update: Cost
    update_rows: int
    decode: Cost
    decode_rows: int
    reference: bool
    """Whether the update runs the model before training, too."""

    @classmethod
    def of(cls, method: Method, footprint: Footprint, geometry: Geometry) -> "Calls":
        algorithm, compute = method.spec.algorithm, method.spec.compute
        forward = min(compute.rows_per_call, geometry.rows_in_flight)
        update = min(compute.rows_per_training_call, geometry.rows_per_update)
        plan = method.plan
        images = geometry.groups_per_rollout * plan.images_per_group
        decode = min(compute.rows_per_decode or compute.rows_per_call, images)
        return cls(
            forward=footprint.forward(forward),
            forward_rows=forward * footprint.rows_per_velocity("rollout"),
            update=footprint.update(
                update, plan.draws // plan.states_per_step, objective_of(method.spec)
            ),
            update_rows=update * footprint.rows_per_velocity("training"),
            decode=footprint.decode(decode),
            decode_rows=decode,
            reference=algorithm.kl_coefficient > 0,
        )


def _flops(calls: Calls, evaluations: Evaluations, images: int) -> Flops:
    forward = calls.forward.flops // calls.forward_rows
    # The reference's forward is a part of the update, and counted apart.
    both = calls.update.flops // calls.update_rows - (forward if calls.reference else 0)
    rollout = forward * (evaluations.trunk + evaluations.tails)
    differentiated = evaluations.training - evaluations.without_gradient
    training = both * differentiated + forward * evaluations.without_gradient
    reference = forward * evaluations.reference
    decoding = calls.decode.flops * images // calls.decode_rows
    return Flops(
        forward=forward,
        rollout=rollout,
        training=training,
        reference=reference,
        decoding=decoding,
        total=rollout + training + reference + decoding,
    )


def _memory(
    calls: Calls, tuning: Tuning, bones: Skeleton, compute: Compute, trajectories: int
) -> MemoryBytes:
    trained = FLOAT32 * sum(p.numel() for p in tuning.parameters().values())
    processes = compute.nodes * compute.processes_per_node
    parts = processes if compute.strategy == "shard" else 1
    encoders = sum(map(weight_bytes, bones.text_encoders))
    stays = {
        "transformer": weight_bytes(bones.model.transformer) // parts,
        "autoencoder": weight_bytes(bones.autoencoder) if bones.autoencoder else 0,
        "gradients": trained // parts,
        "optimizer": MOMENTS * trained // parts,
        "average": trained // parts,
        "reference": sum(map(weight_bytes, tuning.networks()[1:])) // parts,
    }
    peaks = {
        "rollout": calls.forward.peak_bytes,
        "scoring": calls.decode.peak_bytes,
        "update": calls.update.peak_bytes,
    }
    # With a GPU, trajectories are in the host's memory, and encoders with a cache, too.
    on_cpu = compute.device == "cpu"
    beside = trajectories if on_cpu else 0
    beside += encoders if on_cpu or not compute.text_cache_mebibytes else 0
    return MemoryBytes(
        **stays,
        **peaks,
        text_encoders=encoders,
        trajectories=trajectories,
        total=sum(stays.values()) + max(peaks.values()) + beside,
    )


def _trajectories(footprint: Footprint, plan: BranchPlan, geometry: Geometry) -> int:
    """States, draws and images-to-be at the end of a rollout, when they are put together."""
    kept = plan.draws + plan.states_per_step
    ends = 0 if plan.trunk_follows_draw else plan.draws
    latents = 2 * geometry.groups_most * len(plan.steps) * (kept + ends)
    return FLOAT32 * latents * torch.Size(footprint.latent_shape).numel()


def _rate_of(rate: str) -> tuple[float, bool]:
    """Operations a second, or rows of the network a second where the second is True."""
    found = RATE.match(rate)
    if found is None or not 0 < float(found[1]) < math.inf:
        raise ManifestInvalid(
            "the command",
            [Problem("--rate", f"got {rate!r}, expected a rate such as 400TFLOP/s or 90/s")],
        )
    in_rows = found[2] == "/s"
    return float(found[1]) * (1 if in_rows else 1e12), in_rows


def _seconds(rate: tuple[float, bool], flops: Flops, processes: int) -> Seconds:
    number, in_rows = rate
    speed = number * flops.forward if in_rows else number
    rollout, scoring = flops.rollout / speed, flops.decoding / speed
    update = (flops.training + flops.reference) / speed
    rollout, scoring, update = (part / processes for part in (rollout, scoring, update))
    return Seconds(
        rate_flops=speed,
        rollout=rollout,
        scoring=scoring,
        update=update,
        total=rollout + scoring + update,
    )


def main() -> int:
    """Returns the exit code; an error is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", default=None)
    given = parser.parse_args()
    try:
        job = read_job_text(sys.stdin.read())
        sys.stdout.write(explain(job, given.rate).model_dump_json(indent=1) + "\n")
    except TempFlowError as error:
        sys.stderr.write(f"error: {error}\n")
        return int(error.exit_code)
    except ValidationError as error:
        sys.stderr.write(f"error: the job is not valid: {error.errors()[0]['msg']}\n")
        return 2
    return 0
