"""The self-test: finds what would break the ratio, and leaves no trace."""

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import Preempted, RewardFailed, SelfTestFailed
from tempflow_api.record import SelfTest
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import scoring, selftest
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.algorithm.sde import Transitions
from tempflow_trainer.data import load_prompts
from tempflow_trainer.loop import Run
from tempflow_trainer.main import build_run
from tempflow_trainer.models import families
from tempflow_trainer.models.base import Conditioning
from tempflow_trainer.rewards.base import Reward, Term
from tempflow_trainer.rollout import Walker
from tests.numerics.toys import FLOW_GRPO, Brightness, Mlp, run_of, spec_of
from tests.unit.trainer.family_cases import ALONE, CPU, DIGITS, FLUX, QWEN, SD3, Case
from tests.unit.trainer.sessions import after, rows, session_of
from tests.unit.trainer.test_session import assert_same_run

BRIGHTNESS = Reward([Term("brightness", 1.0, Brightness())])
SMALL_CALLS = {"compute.rowsPerTrainingCall": 3, "compute.rowsPerCall": 40}


def test_a_sound_run_passes_with_room() -> None:
    report = selftest.examine(run_of(spec_of()), BRIGHTNESS, spec_of())
    assert selftest.problem(report) is None
    assert report.bound == pytest.approx(3e-4)
    assert report.rollout_difference is not None
    found = [report.rollout_difference, report.full_call_difference, report.one_row_difference]
    assert max(found) < 1e-2 * report.bound
    assert report.tensors_with_gradient == report.tensors_changed == 4
    assert report.trained_parameters == sum(p.numel() for p in Mlp().transformer.parameters())


def test_nothing_is_different_afterwards(tmp_path: Path) -> None:
    """Neither at once nor in what is learned after it, to the last bit."""
    spec = spec_of({"algorithm.epochs": 3, **SMALL_CALLS})
    run = run_of(spec)
    before = {n: p.detach().clone() for n, p in run.tuning.parameters().items()}
    random = torch.get_rng_state()
    selftest.examine(run, BRIGHTNESS, spec)
    assert all(torch.equal(before[n], p) for n, p in run.tuning.parameters().items())
    assert all(p.grad is None for p in run.tuning.parameters().values())
    assert not run.optimizer.state_dict()["state"]
    assert set(run.policy.evaluations.values()) == {0}
    assert torch.equal(torch.get_rng_state(), random)
    session_of(spec, tmp_path / "tested").train()
    off = spec_of({"algorithm.epochs": 3, **SMALL_CALLS, "selfTest.enabled": False})
    session_of(off, tmp_path / "untested").train()
    assert_same_run(tmp_path / "tested", tmp_path / "untested")
    assert (tmp_path / "tested" / layout.SELF_TEST).is_file()
    assert not (tmp_path / "untested" / layout.SELF_TEST).exists()


class Batched(Mlp):
    """Its velocity depends on how many rows a call has, as careless kernels do."""

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        found = super().velocity(latents_BCHW, sigma_B, conditioning)
        return found * (1 + 0.02 * min(len(latents_BCHW), 4))


class Detached(Mlp):
    """What is trained does not reach the velocity."""

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        return super().velocity(latents_BCHW, sigma_B, conditioning).detach().requires_grad_()


class Overflowing(Mlp):
    """Fine in batches, not a number in calls as small as those of the walk."""

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        found = super().velocity(latents_BCHW, sigma_B, conditioning)
        return found * torch.nan if len(found) <= 2 and sigma_B[0] < 0.9 else found


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Batched, r"differ by .*under the same weights.*rowsPerCall equal to rowsPerTrainingCall"),
        (Detached, r"an optimizer step changes 0 of .* do not reach the velocity"),
    ],
)
def test_what_breaks_the_ratio_stops_the_run(model: type[Mlp], words: str, tmp_path: Path) -> None:
    spec = spec_of(SMALL_CALLS)
    session = session_of(spec, tmp_path)
    session.run = run_of(spec, model())
    with pytest.raises(SelfTestFailed, match=words):
        session.train()
    report = SelfTest.model_validate_json((tmp_path / layout.SELF_TEST).read_bytes())
    assert selftest.problem(report) is not None
    assert not (tmp_path / layout.METRICS).exists() or not rows(tmp_path, layout.METRICS)


class OtherNoise(Walker):
    """Its draws have a little more noise than the job's."""

    def transitions(self, plan: BranchPlan) -> Transitions:
        return Walker.transitions(replace(self, noise_level=1.01 * self.noise_level), plan)


class OtherLevel(Walker):
    """Its network is told the next noise level."""

    def _velocity(
        self,
        x_BCHW: Tensor,
        k: int,
        conditioning: Conditioning,
        owner_B: Tensor,
        purpose: str = "rollout",
    ) -> Tensor:
        return super()._velocity(x_BCHW, k + 1, conditioning, owner_B, purpose)


class OtherPrompt(Walker):
    """Every row is drawn for the first prompt."""

    def _velocity(
        self,
        x_BCHW: Tensor,
        k: int,
        conditioning: Conditioning,
        owner_B: Tensor,
        purpose: str = "rollout",
    ) -> Tensor:
        return super()._velocity(x_BCHW, k, conditioning, 0 * owner_B, purpose)


class Unguided(Walker):
    """Draws without the guidance that the update has."""

    def _velocity(
        self,
        x_BCHW: Tensor,
        k: int,
        conditioning: Conditioning,
        owner_B: Tensor,
        purpose: str = "rollout",
    ) -> Tensor:
        plain = replace(self, policy=replace(self.policy, guidance_scale=1.0))
        return Walker._velocity(plain, x_BCHW, k, conditioning, owner_B, purpose)


@pytest.mark.parametrize("kind", [OtherNoise, OtherLevel, OtherPrompt, Unguided])
@pytest.mark.parametrize("method", ["tempflow", "flow-grpo"])
def test_a_rollout_that_is_not_what_is_trained_stops_the_run(
    kind: type[Walker], method: str
) -> None:
    """Also within ten clip ranges of 1e-4, the bound of the presets in half precision."""
    changes = FLOW_GRPO if method == "flow-grpo" else {}
    spec = spec_of(
        {
            **changes,
            "sampling.guidanceScale": 3.0,
            "algorithm.clipRange": 1e-4,
            "selfTest.logProbTolerance": 10,
        }
    )
    run = run_of(spec, Mlp(guided=True))
    assert selftest.problem(selftest.examine(run, BRIGHTNESS, spec)) is None
    walker = kind(**vars(run.walker))
    report = selftest.examine(replace(run, walker=walker), BRIGHTNESS, spec)
    assert "what is trained is not what has drawn" in str(selftest.problem(report))
    # The velocities of the update are what they were: only the walk gives it away.
    assert max(report.full_call_difference, report.one_row_difference) < 1e-2 * report.bound


def test_guidance_of_its_own_in_training_is_no_fault() -> None:
    spec = spec_of({"sampling.guidanceScale": 3.0, "sampling.trainingGuidanceScale": 1.0})
    report = selftest.examine(run_of(spec, Mlp(guided=True)), BRIGHTNESS, spec)
    assert report.rollout_difference is None
    assert selftest.problem(report) is None


def test_a_run_that_trains_nothing_stops(tmp_path: Path) -> None:
    spec = DIGITS.spec(tmp_path)
    model = families.load(spec.model, cache=tmp_path, device=CPU)
    run = build_run(spec, model, load_prompts(spec), ALONE, CPU, lambda: False)
    run = replace(run, objective=replace(run.objective, kl_coefficient=0.0))
    model.transformer.requires_grad_(False)
    report = selftest.examine(run, run.reward, spec)
    assert (report.trained_parameters, report.tensors_with_gradient) == (0, 0)
    assert "no parameter is trained: spec.model.lora.targets" in str(selftest.problem(report))


def test_an_image_that_is_not_a_number_stops_the_run() -> None:
    with pytest.raises(RewardFailed, match="nothing to score: images from nan"):
        selftest.examine(run_of(spec_of(), Overflowing()), BRIGHTNESS, spec_of())


def test_a_difference_that_is_not_a_number_is_a_problem() -> None:
    report = selftest.examine(run_of(spec_of()), BRIGHTNESS, spec_of())
    broken = report.model_copy(update={"one_row_difference": float("nan")})
    assert "by nan" in str(selftest.problem(broken))


def test_the_tolerance_is_the_bound() -> None:
    spec = spec_of({"selfTest.logProbTolerance": 1e-6, **SMALL_CALLS})
    session_run = run_of(spec, Batched())
    report = selftest.examine(session_run, BRIGHTNESS, spec)
    loose = spec_of({"selfTest.logProbTolerance": 100.0, **SMALL_CALLS})
    assert selftest.problem(report) is not None
    assert selftest.problem(selftest.examine(session_run, BRIGHTNESS, loose)) is None


def test_a_reward_that_hangs_is_waited_for_with_the_other_ranks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In meetings a beat apart, as in an epoch, so that none is longer than ranks bear."""
    monkeypatch.setattr(scoring, "BEAT_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    released, stop = threading.Event(), threading.Event()

    class Hanging(Brightness):
        def score(self, *_arguments: object) -> Tensor:
            threading.Timer(0.3, stop.set).start()
            released.wait(20)
            return torch.zeros(1)

    reward = Reward([Term("slow", 1.0, Hanging())])
    run = replace(run_of(spec_of()), stop_requested=stop.is_set)
    began = time.monotonic()
    try:
        with pytest.raises(Preempted):
            selftest.examine(run, reward, spec_of())
        assert time.monotonic() - began < 15
    finally:
        released.set()
    assert "waiting for reward slow on rank 0: 0/1 images after " in caplog.text


def test_it_runs_once_for_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    examine = selftest.examine

    def noted(run: Run, reward: Reward, spec: JobSpec) -> SelfTest:
        asked.append(None)
        return examine(run, reward, spec)

    monkeypatch.setattr(selftest, "examine", noted)
    with pytest.raises(Preempted):
        session_of(spec_of(), tmp_path, stop_requested=after(2)).train()
    with pytest.raises(Preempted):
        session_of(spec_of(), tmp_path, stop_requested=after(2), attempt=1).train()
    assert len(asked) == 1
    changed = spec_of({"compute.rowsPerCall": 17})
    session_of(changed, tmp_path, attempt=2).train()
    assert len(asked) == 2


@pytest.mark.parametrize("case", [DIGITS, SD3, FLUX, QWEN], ids=str)
def test_real_families_pass(case: Case, tmp_path: Path) -> None:
    spec = case.spec(tmp_path)
    model = families.load(spec.model, cache=tmp_path, device=CPU)
    run = build_run(spec, model, load_prompts(spec), ALONE, CPU, lambda: False)
    report = selftest.examine(run, run.reward, spec)
    # The clip range is the paper's 1e-4, and these latents are small: a hard case.
    wide = report.model_copy(update={"bound": 1e-4})
    assert selftest.problem(wide) is None
    assert 0 < report.tensors_changed <= report.tensors_with_gradient
    assert replace(run).policy.evaluations["training"] == 0
