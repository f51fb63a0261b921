"""Mistakes that the mathematics must not survive, each with the test that catches it.

``make mutants`` makes each of them in a copy of the trainer, runs the one test, and reports what
survived; ``make mutants NAME=clip`` takes those whose name contains ``clip``. "Weight not detached"
is none of them: weights come from the schedule, so there is no graph to detach them from.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINER = Path("trainer/tempflow_trainer")
CATCH_SECONDS = 300


@dataclass(frozen=True)
class Mutant:
    """``source`` of ``file``, which it has once, is replaced; ``test`` must fail then."""

    name: str
    file: str
    source: str
    replacement: str
    test: str
    """Below ``tests``."""


SDE = "algorithm/sde.py"
BRANCHING = "algorithm/branching.py"
LOSS = "algorithm/loss.py"
ADVANTAGES = "algorithm/advantages.py"
WEIGHTING = "algorithm/weighting.py"
VARIANT = "numerics/test_variants.py::test_a_variant_learns_what_its_plain_version_learns"

MUTANTS = (
    Mutant(
        "T in place of T - 1 branch steps",
        BRANCHING,
        "tuple(range(total_steps - 1))",
        "tuple(range(total_steps))",
        "numerics/test_branching.py::test_cost_of_the_papers_plan",
    ),
    Mutant(
        "swapped noise levels",
        SDE,
        "from_S, to_S = schedule.sigmas[steps], schedule.sigmas[landings]",
        "to_S, from_S = schedule.sigmas[steps], schedule.sigmas[landings]",
        "numerics/test_sde.py::test_noise_of_the_first_step_is_the_noise_level_and_all_scale_with_it",
    ),
    Mutant(
        "no cap at the first step",
        SDE,
        "torch.where(first_S, to_S, from_S)",
        "torch.where(from_S == 1, to_S, from_S)",
        "numerics/test_sde.py"
        "::test_the_first_step_is_found_by_its_place_and_not_by_a_noise_of_exactly_one",
    ),
    Mutant(
        "drift of the wrong sign",
        SDE,
        "x_factor_S=1 + half_g2_over_sigma_S * dt_S",
        "x_factor_S=1 - half_g2_over_sigma_S * dt_S",
        "numerics/test_sde.py::test_variance_of_the_drawn_data",
    ),
    Mutant(
        "sigma for 1 - sigma in the velocity's factor",
        SDE,
        "half_g2_over_sigma_S * (1 - from_S)",
        "half_g2_over_sigma_S * from_S",
        "numerics/test_sde.py::test_the_drift_is_the_velocity_less_half_g2_times_the_true_score",
    ),
    Mutant(
        "noise of |dt| in place of its root",
        SDE,
        "noise_std_S=diffusion_S * torch.sqrt(-dt_S)",
        "noise_std_S=diffusion_S * -dt_S",
        "numerics/test_weighting.py::test_weights_of_ten_steps",
    ),
    Mutant(
        "cps with the noise of where it starts",
        SDE,
        "noise_std_S=to_S * math.sin",
        "noise_std_S=from_S * math.sin",
        "numerics/test_steps.py"
        "::test_cps_steps_keep_the_shares_of_image_and_noise_that_the_schedule_asks_for",
    ),
    Mutant(
        "cps that removes no predicted noise",
        SDE,
        "kept_S = to_S * math.cos(noise_level * math.pi / 2)",
        "kept_S = to_S",
        "numerics/test_steps.py::test_cps_steps_do_not_have_the_marginals_of_the_flow",
    ),
    Mutant(
        "dance with the diffusion of the flow",
        SDE,
        'if kind == "dance":',
        'if kind == "no such kind":',
        "numerics/test_steps.py::test_dance_steps_have_the_drift_of_the_true_score_and_the_same_"
        "noise_everywhere",
    ),
    Mutant(
        "likelihood without the half",
        SDE,
        "-deviation / (2 * std**2)",
        "-deviation / std**2",
        "numerics/test_sde.py::test_expected_log_probability_of_a_fresh_draw",
    ),
    Mutant(
        "summed in place of averaged likelihood",
        SDE,
        ".square().mean(dim=(-3, -2, -1))",
        ".square().sum(dim=(-3, -2, -1))",
        "numerics/test_sde.py::test_log_probability_is_the_mean_over_the_dimensions",
    ),
    Mutant(
        "gradient through the draw",
        SDE,
        "draw_BCHW.detach().float()",
        "draw_BCHW.float()",
        "numerics/test_steps.py::test_no_gradient_goes_through_a_draw",
    ),
    Mutant(
        "weights over their sum",
        WEIGHTING,
        "weight_S / weight_S.mean()",
        "weight_S / weight_S.sum()",
        "numerics/test_weighting.py"
        "::test_weights_average_to_one_and_do_not_depend_on_the_noise_level",
    ),
    Mutant(
        "weights by variance",
        WEIGHTING,
        "return steps.noise_std_S",
        "return steps.noise_std_S**2",
        "numerics/test_weighting.py"
        "::test_the_constants_of_the_reference_code_come_out_of_the_schedules",
    ),
    Mutant(
        "guard multiplied by |dt|",
        WEIGHTING,
        "return 1 / steps.dt_S.abs()",
        "return steps.dt_S.abs()",
        "numerics/test_steps.py"
        "::test_with_guard_the_gradient_is_of_one_size_at_all_steps_but_the_first",
    ),
    Mutant(
        "prompt for seed groups",
        ADVANTAGES,
        'if scope == "seed" else',
        'if scope == "prompt" else',
        f"{VARIANT}[another seed]",
    ),
    Mutant(
        "sample deviation (ddof)",
        ADVANTAGES,
        "mean_GS(centred_GSK.square()).sqrt()",
        "(mean_GS(centred_GSK.square()) * 6 / 5).sqrt()",
        "numerics/test_advantages.py::test_six_rewards_in_a_row",
    ),
    Mutant(
        "deviation of the batch without ddof 0",
        ADVANTAGES,
        "std(dim=1, correction=0)",
        "std(dim=1, correction=1)",
        "numerics/test_flow_grpo.py::test_flow_grpo_is_the_plain_one",
    ),
    Mutant(
        "epsilon inside the group forgotten",
        ADVANTAGES,
        "(found.std_GS[..., None] + rule.epsilon)",
        "(found.std_GS[..., None])",
        "numerics/test_advantages.py::test_equal_rewards_teach_exactly_nothing",
    ),
    Mutant(
        "advantages cut on one side",
        ADVANTAGES,
        "normalised.clamp(-rule.clip_max, rule.clip_max)",
        "normalised.clamp(max=rule.clip_max)",
        f"{VARIANT}[advantages cut]",
    ),
    Mutant(
        "steps mixed in one group",
        ADVANTAGES,
        "sums_NS.index_add_(0, group_G, values_GSK.sum(dim=2))",
        "sums_NS.index_add_(0, group_G, values_GSK.sum(dim=(1, 2))[:, None].expand(-1, steps)"
        " / steps)",
        "numerics/test_advantages.py::test_steps_are_never_compared_with_one_another",
    ),
    Mutant(
        "optimistic clipping",
        LOSS,
        "torch.minimum(ratio_BK * advantage_BK, clipped_BK * advantage_BK)",
        "torch.maximum(ratio_BK * advantage_BK, clipped_BK * advantage_BK)",
        "numerics/test_objective.py::test_the_surrogate_is_the_pessimistic_of_the_two_gains",
    ),
    Mutant(
        "loss of the wrong sign",
        LOSS,
        "return -weight_B.to(gain_BK)[:, None] * gain_BK",
        "return weight_B.to(gain_BK)[:, None] * gain_BK",
        "numerics/test_objective.py::test_the_surrogate_is_the_pessimistic_of_the_two_gains",
    ),
    Mutant(
        "clipped below only",
        LOSS,
        "ratio_BK.clamp(1 - clip_range, 1 + clip_range)",
        "ratio_BK.clamp(min=1 - clip_range)",
        "numerics/test_objective.py::test_the_surrogate_is_the_pessimistic_of_the_two_gains",
    ),
    Mutant(
        "guarded ratio with its bias",
        LOSS,
        "(log_ratio_BK + moved_B[:, None])",
        "(log_ratio_BK - moved_B[:, None])",
        "numerics/test_steps.py"
        "::test_the_guarded_log_ratio_is_the_noise_times_the_shift_of_the_mean",
    ),
    Mutant(
        "kl without the half",
        LOSS,
        "squared_B / (2 * std_B.to(squared_B) ** 2)",
        "squared_B / (std_B.to(squared_B) ** 2)",
        "numerics/test_sde.py::test_kl_of_a_unit_difference_of_velocity",
    ),
    Mutant(
        "kl times dt squared",
        LOSS,
        "std_B / dt_B.abs().sqrt()",
        "std_B / dt_B.abs()",
        "numerics/test_steps.py::test_forms_of_the_divergence",
    ),
    Mutant(
        "kl without gradient",
        "experience.py",
        "kl_B = self._divergence_B(batch, now, before)",
        "kl_B = self._divergence_B(batch, now, before).detach()",
        "numerics/test_objective.py"
        "::test_divergence_is_from_the_model_before_training_and_pulls_back_to_it",
    ),
    Mutant(
        "kl from the weights of now",
        "experience.py",
        "with torch.no_grad(), tuning.reference(policy) as reference:",
        "with torch.no_grad(), tuning.reference(policy) as _:\n                reference = policy",
        "numerics/test_objective.py"
        "::test_divergence_is_from_the_model_before_training_and_pulls_back_to_it",
    ),
    Mutant(
        "old log-probability with gradient",
        "experience.py",
        "old_BK = log_prob_BK.detach() if old_BK is None",
        "old_BK = log_prob_BK if old_BK is None",
        "numerics/test_objective.py"
        "::test_one_forward_for_all_draws_has_the_gradient_of_one_forward_each",
    ),
    Mutant(
        "weights of other steps",
        "experience.py",
        "weight_B=weights_S[step_B]",
        "weight_B=weights_S.flip(0)[step_B]",
        f"{VARIANT}[another seed]",
    ),
    Mutant(
        "rows of the wrong group",
        "experience.py",
        "torch.arange(groups).repeat_interleave(plan.rows_per_group)",
        "torch.arange(groups).repeat(plan.rows_per_group)",
        f"{VARIANT}[another seed]",
    ),
    Mutant(
        "trunk that follows its draw",
        "rollout.py",
        "trunk = sde.ode_step(trunk, v_trunk, float(self.schedule.dt_T[k]))",
        "trunk = branches[-1].x_GKCHW[:, 0] if branches else trunk",
        "numerics/test_rollout.py::test_noise_of_a_step_moves_the_images_of_that_step_alone",
    ),
    Mutant(
        "images credited to the next step",
        "rollout.py",
        "return rewards_N[self.image_of_GSK]",
        "return rewards_N[self.image_of_GSK.roll(1, dims=1)]",
        "numerics/test_rollout.py::test_a_reward_is_credited_to_the_draw_whose_image_it_is",
    ),
    Mutant(
        "same noise for every draw",
        "loop.py",
        'draw(group, "branch", step, k) for k in range(plan.draws)',
        'draw(group, "branch", step, 0) for k in range(plan.draws)',
        f"{VARIANT}[another seed]",
    ),
    Mutant(
        "second order of the first step's size",
        "algorithm/solvers.py",
        "(1 + half_ratio) * image_BCHW - half_ratio * before.image_BCHW",
        "(1 - half_ratio) * image_BCHW + half_ratio * before.image_BCHW",
        "numerics/test_solvers.py::test_it_is_the_multistep_solver_of_diffusers",
    ),
    Mutant(
        "guidance of the rollout in training",
        "models/base.py",
        "return self.training_guidance_scale\n",
        "return self.guidance_scale\n",
        f"{VARIANT}[guidance of training]",
    ),
    Mutant(
        "gradient of the unconditional velocity kept",
        "models/base.py",
        "            with torch.no_grad():\n                plain = self.model.velocity",
        "            with torch.enable_grad():\n                plain = self.model.velocity",
        f"{VARIANT}[guidance gradient]",
    ),
    Mutant(
        "a window that never moves",
        "algorithm/exploration.py",
        "min(epoch // chosen.every_epochs, places)",
        "min(0 // chosen.every_epochs, places)",
        "numerics/test_exploration.py"
        "::test_a_sliding_window_moves_from_noise_to_image_and_stays_there",
    ),
    Mutant(
        "merged steps that reach the image",
        "algorithm/exploration.py",
        "last = self.schedule.steps - 1",
        "last = self.schedule.steps",
        "numerics/test_exploration.py::test_merged_steps_are_as_short_as_their_noise_allows",
    ),
)


def occurrences(mutant: Mutant) -> int:
    """Of the text that is to be replaced."""
    return (ROOT / TRAINER / mutant.file).read_text(encoding="utf-8").count(mutant.source)


def is_caught(mutant: Mutant) -> bool:
    """Whether its test fails; a test that cannot be run is an error, not a catch.

    Raises:
        RuntimeError: pytest found no test, did not run it, or did not come to an end.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "trainer"
        shutil.copytree(ROOT / "trainer", copy, ignore=shutil.ignore_patterns("__pycache__"))
        target = Path(folder) / TRAINER / mutant.file
        text = target.read_text(encoding="utf-8")
        target.write_text(text.replace(mutant.source, mutant.replacement), encoding="utf-8")
        paths = [str(copy), str(ROOT / "sdk"), str(ROOT / "operator"), str(ROOT)]
        pytest = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*pytest, f"tests/{mutant.test}"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=CATCH_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{mutant.name}: no verdict in {CATCH_SECONDS} s") from error
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main(wanted: str = "") -> int:
    """Try all mutants whose name contains ``wanted``; 1 if one survives."""
    chosen = [mutant for mutant in MUTANTS if wanted in mutant.name]
    began = time.monotonic()
    caught = []
    for mutant in chosen:
        caught.append(is_caught(mutant))
        word = "caught  " if caught[-1] else "SURVIVED"
        print(f"{word}  {mutant.name}  ({mutant.test})", flush=True)
    print(f"{sum(caught)} of {len(caught)} caught in {time.monotonic() - began:.0f} s")
    return 0 if all(caught) and caught else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
