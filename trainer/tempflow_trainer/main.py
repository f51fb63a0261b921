"""One rank of a run: read the job, build its parts, train, and end with the right code."""

import contextlib
import errno
import json
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tempflow_api import naming
from tempflow_api.errors import (
    DeviceMissing,
    ExitCode,
    ManifestInvalid,
    Preempted,
    Problem,
    RewardFailed,
    StoreUnavailable,
    TempFlowError,
)
from tempflow_api.retention import Retention
from tempflow_api.rules import broken_rules
from tempflow_api.v1alpha1 import JobSpec, TempFlowGRPOJob
from tempflow_trainer import distributed, preflight, tracking
from tempflow_trainer.algorithm import sde
from tempflow_trainer.algorithm.advantages import AdvantageRule
from tempflow_trainer.algorithm.exploration import Exploration
from tempflow_trainer.checkpoint import Checkpoints
from tempflow_trainer.data import Prompt, PromptOrder, load_prompts
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.ema import Ema
from tempflow_trainer.evaluation import Evaluator
from tempflow_trainer.experience import Objective
from tempflow_trainer.log_tail import LogTail
from tempflow_trainer.loop import Run
from tempflow_trainer.metrics import Record, Stopwatch, now, phase_of
from tempflow_trainer.models import families
from tempflow_trainer.models.base import FlowModel, Policy, TextEncoder
from tempflow_trainer.models.text_cache import TextCache
from tempflow_trainer.models.tuning import FullTuning, LoraTuning, Tuning
from tempflow_trainer.origin import Origin, older_runs
from tempflow_trainer.progress import ProgressServer
from tempflow_trainer.rewards import registry
from tempflow_trainer.rewards.base import Place
from tempflow_trainer.rollout import Walker
from tempflow_trainer.session import Session
from tempflow_trainer.store import open_store
from tempflow_trainer.store_base import when_it_answers
from tempflow_trainer.tracking import Tracking

log = logging.getLogger(__name__)

# Scoring of the last part is waited for, so more parts hide more; fewer have fuller calls.
SERVED_PARTS = 8
# What to change when the device's memory does not suffice, by the phase in which it did not.
MEMORY_REMEDIES = {
    "start": "set spec.model.precision to bfloat16, spec.compute.textCacheMebibytes, or "
    "spec.compute.strategy to shard",
    "self-test": "lower spec.compute.rowsPerCall and spec.compute.rowsPerTrainingCall, or set "
    "spec.compute.gradientCheckpointing",
    "rollout": "lower spec.compute.rowsPerCall, or set spec.compute.textCacheMebibytes",
    "scoring": "lower spec.compute.rowsPerDecode, set spec.compute.tiledDecode, or have the reward "
    "served (spec.rewards[].service)",
    "update": "lower spec.compute.rowsPerTrainingCall, or set spec.compute.gradientCheckpointing",
    "evaluation": "lower spec.compute.rowsPerCall or spec.compute.rowsPerDecode",
    "checkpoint": "lower spec.compute.rowsPerCall, which leaves more room between the phases",
}


def device_of(spec: JobSpec, local_rank: int) -> torch.device:
    """The device that the job asks for.

    Raises:
        DeviceMissing: it is not there; there is no fallback.
    """
    if spec.compute.device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise DeviceMissing(
            f"spec.compute.device: cuda asked for, {count} GPUs found and "
            f"{spec.compute.processes_per_node} needed; set it to cpu, or lower "
            "spec.compute.processesPerNode"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # TF32 for products of matrices, as the published code: several times as fast. What has to be
    # float32, the stochastic step and log-probabilities, multiplies no matrices.
    torch.set_float32_matmul_precision("high")
    return device


def in_parts(spec: JobSpec, ranks: Ranks) -> bool:
    """Whether each rank holds its share of the network only."""
    return spec.compute.strategy == "shard" and ranks.world > 1


def tuning_of(spec: JobSpec, model: FlowModel, *, to_be_sharded: bool = False) -> Tuning:
    """The weights of ``model`` that the job trains; they are set up for it."""
    if spec.model.lora is not None:
        return LoraTuning(model, spec.model.lora, spec.algorithm.seed)
    keep_reference = spec.algorithm.kl_coefficient > 0
    return FullTuning(model, keep_reference=keep_reference, to_be_sharded=to_be_sharded)


def build_run(
    spec: JobSpec,
    model: FlowModel,
    prompts: list[Prompt],
    ranks: Ranks,
    device: torch.device,
    stop_requested: Callable[[], bool],
    place: Place | None = None,
    connected: registry.Connected | None = None,
) -> Run:
    """The parts of a run, from a specification that keeps all rules.

    The model is on ``device``, or on the CPU where each rank is to hold its share of it.

    Raises:
        ManifestInvalid: guidance that this model does not have.
        RewardFailed: a reward that does not exist, or compares draws where there is one.
    """
    algorithm, sampling = spec.algorithm, spec.sampling
    require_guidance(spec, model)
    set_memory_savers(spec, model)
    sharded = in_parts(spec, ranks)
    tuning = tuning_of(spec, model, to_be_sharded=sharded)
    if sharded:
        tuning.shard(ranks, device)
        # A cache brings the text encoders to the device when it needs them.
        model.move_rest(device, text_encoders=not spec.compute.text_cache_mebibytes)
    policy = Policy.of(
        model,
        guidance_scale=sampling.guidance_scale,
        negative_prompt=sampling.negative_prompt,
        device=device,
        text=text_encoder_of(spec, model, device),
        rows_per_decode=spec.compute.rows_per_decode,
        training_guidance_scale=sampling.training_guidance_scale,
        unconditional_gradient=algorithm.guidance_gradient == "both",
    )
    schedule = model.schedule(sampling.steps, sampling.height, sampling.width)
    walker = Walker(
        policy, schedule, sampling.noise_level, spec.compute.rows_per_call, sampling.sde
    )
    reward = registry.build(spec.rewards, place, connected)
    if reward.group_wise and algorithm.branches_per_seed < 2:
        raise RewardFailed(
            "spec.rewards: a reward compares the draws of a branch step, of which there is one; "
            "raise algorithm.branchesPerSeed, or leave the reward to tempflow's method"
        )
    return Run(
        ranks=ranks,
        policy=policy,
        tuning=tuning,
        optimizer=_optimizer(spec, tuning),
        ema=Ema(
            tuning.parameters(),
            decay=spec.model.ema.decay,
            every_updates=spec.model.ema.every_updates,
        ),
        order=PromptOrder(
            prompts,
            algorithm.prompts_per_epoch,
            algorithm.seeds_per_prompt,
            algorithm.updates_per_epoch,
            spec.data.shuffle,
            algorithm.seed,
        ),
        exploration=Exploration(algorithm, sampling, schedule),
        walker=walker,
        reward=reward,
        advantage_rule=AdvantageRule(**algorithm.advantage.model_dump()),
        objective=objective_of(spec),
        latent_shape=model.latent_shape(sampling.height, sampling.width),
        run_seed=algorithm.seed,
        rows_per_training_call=spec.compute.rows_per_training_call,
        max_grad_norm=spec.optimizer.max_grad_norm,
        half_range=spec.model.precision == "float16" and spec.model.lora is not None,
        clock=Stopwatch(),
        stop_requested=stop_requested,
        groups_per_rollout=groups_per_rollout(spec, ranks.world),
    )


def require_guidance(spec: JobSpec, model: FlowModel) -> None:
    """Whether a model guides itself is said by its configuration, which no rule can read.

    Raises:
        ManifestInvalid: guidance that this model does not have.
    """
    if spec.algorithm.guidance_gradient == "conditional" and not model.classifier_free:
        problem = Problem(
            "spec.algorithm.guidanceGradient",
            f"is both for {spec.model.source}: it guides itself, without an unconditional velocity",
        )
        raise ManifestInvalid("the job", [problem])


def groups_per_rollout(spec: JobSpec, world: int) -> int | None:
    """Start noises that a process draws at once; None: all.

    Parts only where scoring needs no processor of ours: drawing in parts costs a little.
    """
    asked = spec.compute.groups_per_rollout
    if asked is not None or not any(map(registry.elsewhere, spec.rewards)):
        return asked
    groups = spec.algorithm.prompts_per_epoch * spec.algorithm.seeds_per_prompt
    return math.ceil(groups / world / SERVED_PARTS)


def set_memory_savers(spec: JobSpec, model: FlowModel) -> None:
    """Switch on what the libraries offer to need less memory, where the job asks for it."""
    if spec.compute.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    if spec.compute.tiled_decode:
        model.decode_in_tiles()


def text_encoder_of(spec: JobSpec, model: FlowModel, device: torch.device) -> TextEncoder:
    """The model itself, or a cache before it."""
    most = spec.compute.text_cache_mebibytes * 2**20
    return TextCache(model, device=device, most_bytes=most) if most else model


def objective_of(spec: JobSpec) -> Objective:
    """The loss that the specification asks for."""
    algorithm = spec.algorithm
    return Objective(
        algorithm.clip_range,
        algorithm.kl_coefficient,
        log_prob=sde.distance_log_prob if spec.sampling.sde == "cps" else sde.log_prob,
        guarded=algorithm.weighting == "guard",
        kl_form=algorithm.kl_form,
    )


def _optimizer(spec: JobSpec, tuning: Tuning) -> torch.optim.Optimizer:
    settings = spec.optimizer
    return torch.optim.AdamW(
        list(tuning.parameters().values()),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )


def evaluator_of(spec: JobSpec, run: Run, prompts: list[Prompt]) -> Evaluator:
    """Deterministic sampling with the evaluation's own steps, size and guidance."""
    sampling, evaluation, model = spec.sampling, spec.evaluation, run.policy.model
    height, width = evaluation.height or sampling.height, evaluation.width or sampling.width
    policy = run.policy
    if evaluation.guidance_scale not in (None, sampling.guidance_scale):
        guided = Policy.of(
            model,
            guidance_scale=float(evaluation.guidance_scale or 1),
            negative_prompt=sampling.negative_prompt,
            device=policy.device,
            text=policy.text,
            rows_per_decode=policy.rows_per_decode,
        )
        policy = replace(guided, evaluations=policy.evaluations)  # one count for the run
    schedule = model.schedule(evaluation.steps, height, width)
    return Evaluator(
        walker=Walker(policy, schedule, sampling.noise_level, spec.compute.rows_per_call),
        reward=run.reward,
        prompts=prompts[: evaluation.prompts],
        images_per_prompt=evaluation.images_per_prompt,
        latent_shape=model.latent_shape(height, width),
        run_seed=spec.algorithm.seed,
        ranks=run.ranks,
        equal_shares=run.tuning.sharded,
    )


def train(
    job: TempFlowGRPOJob, ranks: Ranks, stop_requested: Callable[[], bool], tail: LogTail
) -> None:
    """Everything that a rank does; raises what ends it other than success."""
    spec, environment = job.spec, os.environ
    work = Path(environment[naming.ENV_WORK_DIR])
    tracking.require(spec.tracking)
    server = None
    if ranks.is_first and environment.get(naming.ENV_PROGRESS_PORT):
        server = ProgressServer(int(environment[naming.ENV_PROGRESS_PORT]))
    staging = work / "staging" / f"rank-{ranks.rank}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        record = Record(work)
    except OSError as error:
        raise StoreUnavailable(f"cannot write to {work}: {error.strerror}") from error
    run_id = environment.get(naming.ENV_RUN_ID, job.metadata.name)
    store = open_store(spec.checkpoint, run_id, work.parent)
    runs, _, run_folder = run_id.rpartition("/")
    if spec.compute.preflight:
        preflight.check(spec.compute, ranks, lambda: device_of(spec, ranks.local_rank), store.probe)
    elif ranks.is_first:
        when_it_answers(store.probe)
    tail.connect(work, store)
    device = device_of(spec, ranks.local_rank)
    prompts = load_prompts(spec)
    connected = registry.connect(spec.rewards, stop_requested)
    cache = Path(environment.get(naming.ENV_MODEL_CACHE, work / "models"))
    # A network that no device could hold whole arrives there in parts.
    home = torch.device("cpu") if in_parts(spec, ranks) else device
    model = families.load(spec.model, cache=cache, device=home)
    place = Place(device, work / "models")
    run = build_run(spec, model, prompts, ranks, device, stop_requested, place, connected)
    if ranks.any(stop_requested()):
        raise Preempted("stopped while it was starting: nothing had been done")
    Session(
        spec=spec,
        run=run,
        evaluator=evaluator_of(spec, run, prompts),
        checkpoints=Checkpoints(
            store,
            staging,
            int(environment.get(naming.ENV_ATTEMPT, "0")),
            ranks.world,
            Retention.of(spec.checkpoint),
            spec.checkpoint.save_timeout_seconds,
        ),
        record=record,
        announce=server.announce if server else lambda _progress: None,
        origin=Origin.of(spec.init_from, spec.checkpoint, staging) if spec.init_from else None,
        older_runs=lambda: older_runs(open_store(spec.checkpoint, runs, work.parent), run_folder),
        run_id=run_id,
        tracking=Tracking.of(spec, job.metadata.name, work) if ranks.is_first else Tracking(),
        on_save=tail.send_beside,
    ).train()


def read_job(path: Path) -> TempFlowGRPOJob:
    """The resolved job, checked again: it may have been edited, or come from a newer operator."""
    return read_job_text(path.read_text(encoding="utf-8"))


def read_job_text(text: str) -> TempFlowGRPOJob:
    """The same, from its JSON."""
    job = TempFlowGRPOJob.model_validate_json(text)
    broken = broken_rules(job.spec)
    if broken:
        raise ValueError("; ".join(f"{rule.path}: {rule.message}" for rule in broken))
    return job


def main() -> int:
    """The edge of a rank: every error becomes one line, a result file and an exit code."""
    rank = int(os.environ.get("RANK", "0"))
    tail = _begin_log(rank)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # gang.py turns it into SIGTERM, once
    _keep(f"rank-{rank}.began", "")
    code, message = ExitCode.DONE, ""
    try:
        job = read_job(Path(os.environ[naming.ENV_JOB_FILE]))
        ranks = distributed.join()
        train(job, ranks, lambda: bool(stopping), tail)
        distributed.leave()
    except TempFlowError as error:
        code, message = error.exit_code, str(error)
    except Exception as error:  # the edge: a rank must say how it ended
        with contextlib.suppress(OSError):  # the log may lie on a disk that is full
            traceback.print_exc()
        tail.note(traceback.format_exc())
        code, message = _judge(error)
    _keep(f"rank-{rank}.json", json.dumps({"rank": rank, "code": int(code), "message": message}))
    if code != ExitCode.FENCED:  # the record is the newer start's
        tail.note(f"{now()} rank {rank} ends with exit code {int(code)}: {message or 'done'}")
        tail.send()
    return int(code)


def _begin_log(rank: int) -> LogTail:
    """All ranks keep all lines for the record; on the terminal one of them says what all do."""
    said = logging.StreamHandler(sys.stderr)
    said.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    tail = LogTail(rank, int(os.environ.get(naming.ENV_ATTEMPT, "0")))
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s rank {rank} %(levelname)s %(message)s",
        handlers=[said, tail],
    )
    return tail


def _judge(error: Exception) -> tuple[ExitCode, str]:
    """A peer that died shows as a failed collective; the peer's own words say more."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text:
        return ExitCode.RANK_DIED, f"lost a peer: {text}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return ExitCode.STORE, f"cannot write {error.filename or 'the record'}: {error.strerror}"
    if isinstance(error, torch.OutOfMemoryError):
        phase = phase_of(error)
        remedy = MEMORY_REMEDIES.get(phase or "", MEMORY_REMEDIES["start"])
        return ExitCode.DEVICE, f"out of device memory in {phase or 'the start'}: {remedy}: {text}"
    return ExitCode.BUG, f"{type(error).__name__}: {text}"


def _keep(name: str, text: str) -> None:
    """For the launcher, which tells by these files how the ranks ended."""
    folder = Path(os.environ[naming.ENV_WORK_DIR]) / "ranks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    except OSError as error:
        log.error("cannot write %s, by which the launcher tells how this ended: %s", name, error)
