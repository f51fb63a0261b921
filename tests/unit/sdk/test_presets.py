"""The manifests that `tempflow init` writes."""

import pytest

from tempflow.manifest import parse_text
from tempflow.presets import Preset, all_presets, listing, preset
from tempflow.refused import Refused
from tempflow_trainer.rewards.registry import REWARDS

PRESETS = all_presets()


def test_the_one_that_runs_anywhere_stands_first() -> None:
    names = [preset.name for preset in PRESETS]
    assert names[0] == "digits"
    assert {
        "sd35m-pickscore",
        "sd35m-geneval",
        "flux-hpsv3",
        "qwen-image-pickscore",
        "sd35m-flow-grpo",
        "flux-flow-grpo",
    } < set(names)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
class TestEach:
    def test_is_valid_and_named_after_itself(self, preset: Preset) -> None:
        assert parse_text(preset.text, preset.name).job.metadata.name == preset.name

    def test_says_what_it_trains_and_on_what(self, preset: Preset) -> None:
        assert len(preset.summary) > 30
        assert preset.hardware

    def test_fits_the_width_of_a_page(self, preset: Preset) -> None:
        assert [line for line in preset.text.splitlines() if len(line) > 100] == []

    def test_gives_reasons(self, preset: Preset) -> None:
        spec = preset.text.partition("spec:")[2].splitlines()
        assert sum(line.strip().startswith("#") for line in spec) >= 10


def test_the_digits_preset_needs_nothing_but_a_processor() -> None:
    spec = parse_text(preset("digits").text, "digits").job.spec
    assert (spec.compute.device, spec.compute.nodes) == ("cpu", 1)
    assert spec.model.source == "builtin:digits"
    assert spec.checkpoint.uri is None
    assert any(reward.weight == 0 for reward in spec.rewards)


@pytest.mark.parametrize(
    ("name", "seeds", "branches", "kl", "noise"),
    [
        ("sd35m-pickscore", 4, 6, 0.001, 0.7),
        ("sd35m-geneval", 4, 6, 0.004, 0.7),
        ("flux-hpsv3", 4, 6, 0.004, 0.9),
        ("qwen-image-pickscore", 4, 6, 0.0, 1.2),
        ("sd35m-flow-grpo", 24, 1, 0.001, 0.7),
        ("flux-flow-grpo", 24, 1, 0.0, 0.9),
    ],
)
def test_the_papers_numbers(name: str, seeds: int, branches: int, kl: float, noise: float) -> None:
    spec = parse_text(preset(name).text, name).job.spec
    algorithm = spec.algorithm
    assert (algorithm.seeds_per_prompt, algorithm.branches_per_seed) == (seeds, branches)
    assert (algorithm.prompts_per_epoch, algorithm.updates_per_epoch) == (48, 2)
    assert (algorithm.kl_coefficient, algorithm.clip_range) == (kl, 1e-4)
    assert spec.sampling.noise_level == noise


# Steps in training and in evaluation, pixels a side, guidance; rank, alpha, decay of the average,
# precision; scope and deviation of advantages; epochs, epochs an evaluation and a save.
COLUMNS = {
    "sd35m-pickscore": ((10, 40, 512, 4.5), (32, 64, 0.9, "float16"), (1000, 20, 100)),
    "sd35m-geneval": ((10, 40, 512, 4.5), (32, 64, 0.9, "float16"), (3000, 20, 100)),
    "flux-hpsv3": ((10, 50, 1024, 3.5), (32, 64, 0.9, "bfloat16"), (250, 20, 30)),
    "qwen-image-pickscore": ((10, 50, 512, 4.0), (64, 128, 0.0, "bfloat16"), (250, 20, 30)),
    "sd35m-flow-grpo": ((10, 40, 512, 4.5), (32, 64, 0.9, "float16"), (1000, 60, 60)),
    "flux-flow-grpo": ((6, 28, 512, 3.5), (64, 128, 0.9, "bfloat16"), (250, 60, 60)),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_the_papers_settings(name: str) -> None:
    drawn, tuned, paced = COLUMNS[name]
    spec = parse_text(preset(name).text, name).job.spec
    sampling, evaluation, model = spec.sampling, spec.evaluation, spec.model
    assert (sampling.steps, evaluation.steps, sampling.width, sampling.guidance_scale) == drawn
    assert sampling.height == sampling.width
    assert sampling.training_guidance_scale is None
    assert model.lora is not None
    assert (model.lora.rank, model.lora.alpha, model.ema.decay, model.precision) == tuned
    assert (model.lora.init, model.ema.every_updates) == ("gaussian", 8 if model.ema.decay else 1)
    checkpoint = spec.checkpoint
    assert (spec.algorithm.epochs, evaluation.every_epochs, checkpoint.every_epochs) == paced
    ours = spec.algorithm.method == "tempflow"
    advantage = spec.algorithm.advantage
    compared = ("seed", "group") if ours else ("prompt", "global")
    assert (advantage.scope, advantage.deviation) == compared
    assert spec.algorithm.weighting == ("noise-aware" if ours else "none")
    assert spec.compute.nodes * spec.compute.processes_per_node == (48 if ours else 32)
    optimizer = spec.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.max_grad_norm) == (
        3e-4,
        1e-4,
        1,
    )


def test_an_unknown_name() -> None:
    with pytest.raises(Refused, match=r"^no preset 'digts'; did you mean 'digits'\?$"):
        preset("digts")
    with pytest.raises(Refused, match=r"^no preset 'zzz': expects digits, flux-flow-grpo, "):
        preset("zzz")


def test_the_list_names_each() -> None:
    assert [line for line in listing() if not line.startswith(" ")] == [p.name for p in PRESETS]


def test_a_preset_says_which_of_its_rewards_does_not_exist() -> None:
    for one in PRESETS:
        job = parse_text(one.text, one.name).job
        lacking = [t.name for t in job.spec.rewards if t.name not in REWARDS]
        assert all(name in one.missing for name in lacking)
        assert bool(one.missing) == bool(lacking)
