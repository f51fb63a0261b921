"""One rank of a run: read the job, build its parts, train, and end with the right code."""

import errno
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from tempflow_api import naming
from tempflow_api.errors import DeviceMissing, ExitCode, StoreUnavailable, TempFlowError
from tempflow_api.rules import broken_rules
from tempflow_api.v1alpha1 import JobSpec, TempFlowGRPOJob
from tempflow_trainer import distributed
from tempflow_trainer.algorithm import sde
from tempflow_trainer.algorithm.advantages import AdvantageRule
from tempflow_trainer.algorithm.exploration import Exploration
from tempflow_trainer.checkpoint import Checkpoints
from tempflow_trainer.data import Prompt, PromptOrder, load_prompts
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.ema import Ema
from tempflow_trainer.evaluation import Evaluator
from tempflow_trainer.experience import Objective
from tempflow_trainer.loop import Run
from tempflow_trainer.metrics import Record, Stopwatch
from tempflow_trainer.models import families
from tempflow_trainer.models.base import FlowModel, Policy
from tempflow_trainer.models.tuning import FullTuning, LoraTuning, Tuning
from tempflow_trainer.progress import ProgressServer
from tempflow_trainer.rewards import registry
from tempflow_trainer.rollout import Walker
from tempflow_trainer.session import Session
from tempflow_trainer.store import open_store

log = logging.getLogger(__name__)


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
    return device


def build_run(
    spec: JobSpec,
    model: FlowModel,
    prompts: list[Prompt],
    ranks: Ranks,
    device: torch.device,
    stop_requested: Callable[[], bool],
) -> Run:
    """The parts of a run, from a specification that keeps all rules."""
    algorithm, sampling = spec.algorithm, spec.sampling
    tuning: Tuning = (
        LoraTuning(model, spec.model.lora, algorithm.seed)
        if spec.model.lora is not None
        else FullTuning(model, keep_reference=algorithm.kl_coefficient > 0)
    )
    policy = Policy.of(
        model,
        guidance_scale=sampling.guidance_scale,
        negative_prompt=sampling.negative_prompt,
        device=device,
        training_guidance_scale=sampling.training_guidance_scale,
        unconditional_gradient=algorithm.guidance_gradient == "both",
    )
    schedule = model.schedule(sampling.steps, sampling.height, sampling.width)
    walker = Walker(
        policy, schedule, sampling.noise_level, spec.compute.rows_per_call, sampling.sde
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
        reward=registry.build(spec.rewards),
        advantage_rule=AdvantageRule(**algorithm.advantage.model_dump()),
        objective=objective_of(spec),
        latent_shape=model.latent_shape(sampling.height, sampling.width),
        run_seed=algorithm.seed,
        rows_per_training_call=spec.compute.rows_per_training_call,
        max_grad_norm=spec.optimizer.max_grad_norm,
        clock=Stopwatch(),
        stop_requested=stop_requested,
    )


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
    """Deterministic sampling with the evaluation's own number of steps."""
    sampling = spec.sampling
    schedule = run.policy.model.schedule(spec.evaluation.steps, sampling.height, sampling.width)
    return Evaluator(
        walker=Walker(run.policy, schedule, sampling.noise_level, spec.compute.rows_per_call),
        reward=run.reward,
        prompts=prompts[: spec.evaluation.prompts],
        images_per_prompt=spec.evaluation.images_per_prompt,
        latent_shape=run.latent_shape,
        run_seed=spec.algorithm.seed,
        ranks=run.ranks,
    )


def train(job: TempFlowGRPOJob, ranks: Ranks, stop_requested: Callable[[], bool]) -> None:
    """Everything that a rank does; raises what ends it other than success."""
    spec, environment = job.spec, os.environ
    work = Path(environment[naming.ENV_WORK_DIR])
    server = None
    if ranks.is_first and environment.get(naming.ENV_PROGRESS_PORT):
        server = ProgressServer(int(environment[naming.ENV_PROGRESS_PORT]))
    staging = work / "staging" / f"rank-{ranks.rank}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        record = Record(work)
    except OSError as error:
        raise StoreUnavailable(f"cannot write to {work}: {error.strerror}") from error
    store = open_store(
        spec.checkpoint, environment.get(naming.ENV_RUN_ID, job.metadata.name), work.parent
    )
    if ranks.is_first:
        store.probe()
    device = device_of(spec, ranks.local_rank)
    prompts = load_prompts(spec)
    model = families.load(spec.model, cache=work / "models", device=device)
    run = build_run(spec, model, prompts, ranks, device, stop_requested)
    Session(
        spec=spec,
        run=run,
        evaluator=evaluator_of(spec, run, prompts),
        checkpoints=Checkpoints(
            store,
            staging,
            int(environment.get(naming.ENV_ATTEMPT, "0")),
            ranks.world,
            spec.checkpoint.keep_last,
        ),
        record=record,
        announce=server.announce if server else lambda _progress: None,
    ).train()


def read_job(path: Path) -> TempFlowGRPOJob:
    """The resolved job, checked again: it may have been edited, or come from a newer operator."""
    job = TempFlowGRPOJob.model_validate_json(path.read_bytes())
    broken = broken_rules(job.spec)
    if broken:
        raise ValueError("; ".join(f"{rule.path}: {rule.message}" for rule in broken))
    return job


def main() -> int:
    """The edge of a rank: every error becomes one line, a result file and an exit code."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # launch.py turns it into SIGTERM, once
    code, message = ExitCode.DONE, ""
    try:
        job = read_job(Path(os.environ[naming.ENV_JOB_FILE]))
        ranks = distributed.join()
        train(job, ranks, lambda: bool(stopping))
        distributed.leave()
    except TempFlowError as error:
        code, message = error.exit_code, str(error)
    except Exception as error:  # the edge: a rank must say how it ended
        traceback.print_exc()
        code, message = _judge(error)
    _write_result(rank, code, message)
    return int(code)


def _judge(error: Exception) -> tuple[ExitCode, str]:
    """A peer that died shows as a failed collective; the peer's own words say more."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text:
        return ExitCode.RANK_DIED, f"lost a peer: {text}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return ExitCode.STORE, f"cannot write {error.filename or 'the record'}: {error.strerror}"
    if isinstance(error, torch.OutOfMemoryError):
        return ExitCode.DEVICE, (
            "out of GPU memory; lower spec.compute.rowsPerCall (rollout) or "
            f"spec.compute.rowsPerTrainingCall (update): {text}"
        )
    return ExitCode.BUG, f"{type(error).__name__}: {text}"


def _write_result(rank: int, code: ExitCode, message: str) -> None:
    folder = Path(os.environ[naming.ENV_WORK_DIR]) / "ranks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{rank}.json").write_text(
            json.dumps({"rank": rank, "code": int(code), "message": message})
        )
    except OSError as error:
        log.error("cannot write how this rank ended: %s", error)


if __name__ == "__main__":
    sys.exit(main())
