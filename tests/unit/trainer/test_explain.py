"""What is explained before a run is what the run then does."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tempflow.manifest import parse_text
from tempflow.presets import all_presets, preset
from tempflow_api.errors import ManifestInvalid, ModelUnavailable
from tempflow_api.explanation import Explanation
from tempflow_api.v1alpha1 import JobSpec, TempFlowGRPOJob
from tempflow_trainer import loop
from tempflow_trainer.algorithm import advantages
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.data import PromptOrder, load_prompts
from tempflow_trainer.explain import explain
from tempflow_trainer.footprint import Watch
from tempflow_trainer.loop import Run
from tempflow_trainer.main import build_run
from tempflow_trainer.models import families
from tempflow_trainer.models.source import ASSETS, BUILTIN
from tests.numerics.toys import FLOW_GRPO, spec_of
from tests.unit.trainer.family_cases import ALONE, CPU, DIGITS, FLUX, KLEIN, QWEN, SD3, Case

LORA: dict[str, object] = {"model.tuning": "lora", "model.lora": {"rank": 4, "alpha": 8}}
JOBS: dict[str, dict[str, object]] = {
    "default": {},
    "two updates, a reference": {
        "algorithm.updatesPerEpoch": 2,
        "algorithm.klCoefficient": 0.01,
        "compute.rowsPerTrainingCall": 7,
    },
    "flow-grpo": FLOW_GRPO,
    "guided LoRA": {**LORA, "sampling.guidanceScale": 3.0},
    "chosen steps, small calls": {
        "algorithm.branchSteps": [0, 2],
        "algorithm.branchesPerSeed": 5,
        "compute.rowsPerCall": 6,
    },
    "drawn in parts": {"compute.groupsPerRollout": 3, "compute.rowsPerCall": 9},
    "more steps, every weight": {"sampling.steps": 8, "algorithm.klCoefficient": 0.001},
    "merged steps": {"sampling.steps": 8, "algorithm.mergeBelow": 0.4},
    "flow-grpo, merged, by |dt|": {
        **FLOW_GRPO,
        "algorithm.weighting": "guard",
        "sampling.steps": 8,
        "algorithm.mergeBelow": 0.4,
    },
    "compared by prompt": {"algorithm.advantage": {"scope": "prompt"}, "sampling.sde": "dance"},
}


def job_of(spec: JobSpec) -> TempFlowGRPOJob:
    return TempFlowGRPOJob.model_validate(
        {
            "apiVersion": "tempflow.dev/v1alpha1",
            "kind": "TempFlowGRPOJob",
            "metadata": {"name": "demo"},
            "spec": spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        }
    )


def started(spec: JobSpec, folder: Path) -> Run:
    torch.set_num_threads(1)
    model = families.load(spec.model, cache=folder, device=CPU)
    return build_run(spec, model, load_prompts(spec), ALONE, CPU, lambda: False)


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_counts_are_those_of_an_executed_epoch(changes: dict[str, object], tmp_path: Path) -> None:
    spec = spec_of(changes)
    told, run = explain(job_of(spec)), started(spec, tmp_path)
    calls: list[tuple[bool, int]] = []
    images: list[int] = []
    velocity = run.policy.rows_per_velocity("rollout")
    network, decode = run.policy.model.transformer, run.policy.model.decode
    network.register_forward_pre_hook(
        lambda _m, _a, given: calls.append(
            (torch.is_grad_enabled(), len(given["hidden_states"]) // velocity)
        ),
        with_kwargs=True,
    )

    def counted(latents_BCHW: Tensor) -> Tensor:
        images.append(len(latents_BCHW))
        return decode(latents_BCHW)

    run.policy.model.decode = counted  # type: ignore[method-assign]
    loop.run_epoch(run, 0)
    done = run.policy.evaluations
    expected = told.evaluations
    assert expected.trunk + expected.tails == done["rollout"]
    assert (expected.training, expected.reference) == (done["training"], done["reference"])
    assert expected.total == sum(done.values())
    assert told.images_scored == sum(images) == told.geometry.images
    geometry = told.geometry
    with_gradient = [rows for grad, rows in calls if grad]
    assert sum(with_gradient) == geometry.updates * geometry.rows_per_update
    assert len(with_gradient) == geometry.updates * geometry.micro_batches_per_update
    assert expected.forward_equivalents == expected.total + 2 * sum(with_gradient) * velocity
    rollout_calls, rows = 0, 0
    for _, more in calls:
        if rows == done["rollout"] // velocity:
            break
        rollout_calls, rows = rollout_calls + 1, rows + more
    assert rollout_calls == geometry.rollout_calls
    steps_are_those_of(told, run)
    compared_are_those_of(told, run)
    weights = [s.weight for s in told.schedule if s.branched]
    assert weights == pytest.approx(run.exploration.weights_S(run.exploration.plan(0)).tolist())
    raw = [s.weight_raw * told.weight_normaliser for s in told.schedule if s.branched]
    assert raw == pytest.approx(weights)
    assert told.trained_parameters == sum(p.numel() for p in run.tuning.parameters().values())


def steps_are_those_of(told: Explanation, run: Run) -> None:
    """What the walker draws at a branch step, wherever it leads, and what it would draw at the
    others."""
    schedule, plan = run.walker.schedule, run.exploration.plan(0)
    assert [s.sigma for s in told.schedule] == schedule.sigmas[:-1].tolist()
    branched = [s for s in told.schedule if s.branched]
    assert [s.step for s in branched] == list(plan.steps)
    drawn = run.walker.transitions(plan)
    assert [s.dt for s in branched] == pytest.approx(drawn.dt_S.tolist(), rel=1e-12)
    assert [s.noise_std for s in branched] == pytest.approx(drawn.noise_std_S.tolist(), rel=1e-12)
    landed = [float(schedule.sigmas[landing]) for landing in plan.landings]
    assert [s.sigma_next for s in branched] == landed
    others = [s for s in told.schedule if not s.branched]
    plain = BranchPlan(schedule.steps, tuple(s.step for s in others), 1, trunk_follows_draw=False)
    would = run.walker.transitions(plain)
    assert [s.dt for s in others] == pytest.approx(would.dt_S.tolist(), rel=1e-12)
    assert [s.noise_std for s in others] == pytest.approx(would.noise_std_S.tolist(), rel=1e-12)


def compared_are_those_of(told: Explanation, run: Run) -> None:
    """The draws whose rewards an advantage reads: those that move it when they change."""
    ids_G = torch.tensor(
        [g.prompt.id for share in run.order.shares(0, rank=0, world=1) for g in share]
    )
    plan = run.exploration.plan(0)
    rewards_GSK = torch.rand(len(ids_G), len(plan.steps), plan.draws, dtype=torch.float64)
    rewards_GSK.requires_grad_()
    advantages.normalised_GSK(rewards_GSK, ids_G, run.advantage_rule)[0, 0, 0].backward()
    assert rewards_GSK.grad is not None
    assert told.groups.compared == int(rewards_GSK.grad.count_nonzero())


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_work_is_cut_as_the_ranks_cut_it(world: int) -> None:
    changes = {"compute.processesPerNode": world, "algorithm.updatesPerEpoch": 1}
    told = explain(job_of(spec_of(changes))).geometry
    order = PromptOrder(load_prompts(spec_of(changes)), 4, 2, 1, True, 0)
    shares = [len(order.shares(0, rank=rank, world=world)[0]) for rank in range(world)]
    assert (told.groups_least, told.groups_most) == (min(shares), max(shares))
    assert (told.processes, told.rows_per_update) == (world, max(shares) * 4)


@pytest.mark.parametrize(
    ("case", "precision"),
    [(case, "float32") for case in (DIGITS, SD3, FLUX, QWEN, KLEIN)]
    + [(SD3, "float16"), (FLUX, "bfloat16")],
    ids=str,
)
def test_every_family_is_explained_from_its_configuration(
    case: Case, precision: str, tmp_path: Path
) -> None:
    """A folder without a single weight will do, and the counts are those of the real model."""
    spec = case.spec(tmp_path, precision)
    real = families.load(spec.model, cache=tmp_path, device=CPU)
    weights = sum(p.numel() for p in real.transformer.parameters())
    if case.pipeline is not None:
        for file in (tmp_path / case.family).rglob("*.safetensors"):
            file.unlink()
    told = explain(job_of(spec))
    assert told.parameters == weights
    height, width = case.size()
    sigmas = real.schedule(spec.sampling.steps, height, width).sigmas
    assert [s.sigma for s in told.schedule] == sigmas[:-1].tolist()
    assert told.flops.rollout > 0 < told.flops.training
    memory = told.memory_bytes
    assert min(memory.rollout, memory.update) > 0
    assert memory.text_encoders == bytes_of(*real.text_encoders())
    decoder = None if real.pipeline is None else real.pipeline.components["vae"]
    assert memory.autoencoder == (bytes_of(decoder) if decoder is not None else 0)


@pytest.mark.slow
def test_a_published_model() -> None:
    """Against what the widths and depths of SD3.5 Medium give by hand: a linear layer is two
    operations a weight and token, attention 4 S^2 d; 2.22e12 a row at 512 pixels, and 1 % more for
    the update beside it. (FLUX.1-dev 21.5e12 with 512 tokens of text, Qwen-Image 18.6e12 with 256.)
    """
    told = explain(parse_text(preset("sd35m-pickscore").text, "preset").job, "250TFLOP/s")
    assert told.parameters / 1e9 == pytest.approx(2.24, abs=0.005)
    assert told.weight_normaliser == pytest.approx(2.2522, abs=5e-5)
    assert told.flops.forward / 2.22e12 == pytest.approx(1.01, abs=0.01)
    assert (told.images_scored, told.evaluations.trunk + told.evaluations.tails) == (10368, 107136)
    assert told.seconds is not None
    work = told.flops.total / told.geometry.processes
    assert told.seconds.total == pytest.approx(work / 250e12)


def test_a_served_reward_is_drawn_for_in_eighths() -> None:
    service = {"endpoints": ["http://scores.example:8080"]}
    rewards = [{"name": "brightness", "service": service}]
    changes: dict[str, object] = {"algorithm.promptsPerEpoch": 12, "rewards": rewards}
    told = explain(job_of(spec_of(changes))).geometry
    assert (told.groups_most, told.groups_per_rollout) == (24, 3)
    whole = explain(job_of(spec_of({"algorithm.promptsPerEpoch": 12}))).geometry
    assert told.images == whole.images
    assert told.rows_in_flight * 8 == whole.rows_in_flight


def test_every_preset_has_a_configuration() -> None:
    for one in all_presets():
        source = parse_text(one.text, one.name).job.spec.model.source
        name = (
            source.removeprefix(BUILTIN)
            if source.startswith(BUILTIN)
            else f"published/{source.replace('/', '--')}"
        )
        assert (ASSETS / name).is_dir()


def test_what_cannot_be_explained_is_said() -> None:
    spec = spec_of({"sampling.width": 64, "sampling.height": 64})
    wrong = spec.model.model_copy(update={"family": "sd3", "source": "/no/such/folder"})
    with pytest.raises(ModelUnavailable, match=r"spec.model.source: no folder '/no/such/folder'"):
        explain(job_of(spec.model_copy(update={"model": wrong})))
    for rate in ("fast", "0/s", "-3TFLOP/s", "1e3", "1e999/s"):
        with pytest.raises(ManifestInvalid, match=r"--rate: got '.*expected a rate such as"):
            explain(job_of(spec_of()), rate)


def test_live_bytes_follow_the_life_of_tensors() -> None:
    with Watch() as live:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        b.mul_(2)
        assert live.now == 8000
        del a
        assert live.now == 4000
        del b
        assert live.now == 4000, "a view keeps its memory"
        del view
        assert (live.now, live.peak) == (0, 8000)


BIG: list[dict[str, object]] = [
    # The rollout is the most; the update; the update, of which only the inputs of blocks are kept.
    {**LORA, "sampling.steps": 6, "compute.rowsPerCall": 128, "algorithm.branchesPerSeed": 8},
    {"algorithm.klCoefficient": 0.01, "compute.rowsPerTrainingCall": 32},
    {
        **LORA,
        "compute.rowsPerCall": 16,
        "compute.rowsPerTrainingCall": 64,
        "compute.gradientCheckpointing": True,
        "algorithm.promptsPerEpoch": 8,
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", BIG, ids=["rollout", "update", "checkpointing"])
def test_memory_is_what_the_allocator_gave(changes: dict[str, object], tmp_path: Path) -> None:
    """By torch's profiler, which hears of every allocation of the processor's allocator."""
    spec = spec_of(changes)
    told = explain(job_of(spec)).memory_bytes
    run = started(spec, tmp_path)
    stays = told.transformer + told.text_encoders + told.average + told.reference
    loop.run_epoch(run, 0)  # gradients and moments are there from now on
    network, *reference = run.tuning.networks()
    parameters = run.tuning.parameters().values()
    moments = [
        run.optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")
    ]
    assert told.transformer == bytes_of(network)
    assert told.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert told.optimizer == sum(moment.nbytes for moment in moments)
    assert told.average == sum(value.nbytes for value in run.ema.values.values())
    assert told.reference == bytes_of(*reference)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loop.run_epoch(run, 1)
    trace = tmp_path / "trace.json"
    seen.export_chrome_trace(str(trace))
    events = [e["args"] for e in json.loads(trace.read_text())["traceEvents"] if is_memory(e)]
    level, highest = 0, 0
    for event in events:
        level += event["Bytes"]
        highest = max(highest, level)
    expected = told.total - stays - told.gradients - told.optimizer
    assert highest == pytest.approx(expected, rel=0.2)


def bytes_of(*modules: nn.Module) -> int:
    tensors = [tensor for m in modules for tensor in (*m.parameters(), *m.buffers())]
    return sum(tensor.nbytes for tensor in tensors)


def is_memory(event: dict[str, Any]) -> bool:
    return event.get("name") == "[memory]"


@pytest.mark.slow
def test_time_is_the_operations_at_a_measured_rate(tmp_path: Path) -> None:
    """One job tells the rate; the epochs of two others then take what their explanations say.

    Processor seconds of one thread, the best of sixteen epochs that take turns: what else runs on
    the machine slows all three or none.
    """
    base = {**LORA, "compute.rowsPerCall": 128, "algorithm.seedsPerPrompt": 3}
    specs = [
        spec_of({**base, **changes})
        for changes in (
            {"sampling.steps": 6},
            {"sampling.steps": 10, "algorithm.branchesPerSeed": 5},
            {"sampling.steps": 8, "algorithm.seedsPerPrompt": 5},
        )
    ]
    runs = [started(spec, tmp_path) for spec in specs]
    turns = [[processor_seconds(run, epoch) for run in runs] for epoch in range(17)]
    best = [min(taken) for taken in zip(*turns[1:], strict=True)]
    rate = explain(job_of(specs[0]), "1/s").flops.total / best[0]
    for spec, took in zip(specs[1:], best[1:], strict=True):
        told = explain(job_of(spec), f"{rate / 1e12}TFLOP/s").seconds
        assert told is not None
        assert told.total == pytest.approx(took, rel=0.2)


def processor_seconds(run: Run, epoch: int) -> float:
    before = time.process_time()
    loop.run_epoch(run, epoch)
    return time.process_time() - before
