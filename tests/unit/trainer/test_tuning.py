"""What is trained, what it is compared with, and what is exported of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import JobSpec, Lora
from tempflow_trainer import loop, seeds
from tempflow_trainer.data import load_prompts
from tempflow_trainer.loop import Run
from tempflow_trainer.main import build_run
from tempflow_trainer.models import families
from tempflow_trainer.models.base import FlowModel, Policy
from tempflow_trainer.models.families.sd3 import Sd3
from tempflow_trainer.models.tuning import LORA_FILE, FullTuning, LoraTuning, Tuning, load_result
from tests.numerics.toys import ALONE, CPU, spec_of
from tests.tiny_models import sd3_pipeline

PROMPTS = ["a three", "a seven"]
LORA = Lora(rank=4, alpha=12)
FAMILIES = ["digits", "sd3"]
SHAPES = {"digits": (1, 14, 14), "sd3": (4, 8, 8)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(family: str, dtype: torch.dtype = torch.float32) -> FlowModel:
    if family == "sd3":
        pipeline = sd3_pipeline().to(dtype=dtype)
        pipeline.text_encoder_3.eval()  # a loaded one has no dropout either
        return Sd3(pipeline, max_text_tokens=16)
    precision = str(dtype).removeprefix("torch.")
    spec = spec_of({"model.precision": precision})
    return families.load(spec.model, cache=Path("unused"), device=CPU)


def policy_of(model: FlowModel) -> Policy:
    return Policy.of(model, guidance_scale=1, negative_prompt="", device=CPU)


@torch.no_grad()
def velocity(model: FlowModel, family: str, policy: Policy | None = None) -> Tensor:
    x = seeds.normal((2, *SHAPES[family]), 0, "x")
    conditioning = model.encode(PROMPTS)
    return (policy or policy_of(model)).velocity(
        x, torch.tensor([0.9, 0.4]), conditioning, purpose="rollout"
    )


def move(tuning: Tuning, size: float = 0.05) -> None:
    """Change every trained parameter, as training would."""
    with torch.no_grad():
        for index, parameter in enumerate(tuning.parameters().values()):
            parameter.add_(size * seeds.normal(tuple(parameter.shape), 0, "move", index))


def tuning_of(kind: str, model: FlowModel) -> Tuning:
    if kind == "lora":
        return LoraTuning(model, LORA, 0)
    return FullTuning(model, keep_reference=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_an_update_of_low_rank_starts_at_none(family: str, init: str) -> None:
    model = model_of(family)
    plain = velocity(model, family)
    tuning = LoraTuning(model, Lora.model_validate({"rank": 4, "init": init}), 0)
    torch.testing.assert_close(velocity(model, family), plain, rtol=1e-5, atol=1e-6)
    assert all(p.dtype == torch.float32 for p in tuning.parameters().values())


def test_only_the_update_is_trained_and_it_starts_by_the_seed_of_the_run() -> None:
    model = model_of("digits")
    first = LoraTuning(model, LORA, 0).parameters()
    trained = {n for n, p in model.transformer.named_parameters() if p.requires_grad}
    assert trained == set(first)
    assert all("lora" in name for name in first)
    again, other = (LoraTuning(model_of("digits"), LORA, seed).parameters() for seed in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_global_generator_is_not_moved_by_the_start_of_the_update() -> None:
    model = model_of("digits")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    LoraTuning(model, LORA, 0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_targets_the_attention_of_both_streams_is_adapted(family: str) -> None:
    model = model_of(family)
    names = LoraTuning(model, LORA, 0).parameters()
    for target in model.lora_targets:
        assert any(f".{target}.lora" in name for name in names), target
    assert not any("ff" in name for name in names)


def test_given_targets_are_the_only_ones() -> None:
    lora = Lora(rank=4, targets=["attn.to_q", "ff.net.2"])
    names = LoraTuning(model_of("digits"), lora, 0).parameters()
    assert {".attn.to_q." in name or ".ff.net.2." in name for name in names} == {True}
    assert any(".ff.net.2." in name for name in names)


@pytest.mark.parametrize(
    ("target", "near"), [("attn.to_queue", "attn.to_q"), ("to_kk", "to_k"), ("o_q", "to_q")]
)
def test_a_target_that_matches_nothing_is_an_error_with_near_names(target: str, near: str) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        LoraTuning(model_of("digits"), Lora(targets=["attn.to_q", target]), 0)
    text = str(caught.value)
    assert text.startswith(
        f"spec.model.lora.targets: {target!r} matches no projection of the model; near names are "
    )
    assert near in text


def test_an_expression_between_slashes_is_for_the_whole_path(tmp_path: Path) -> None:
    """What it adapted is in the exported file, so that any loader adapts the same."""
    model = model_of("digits")
    tuning = LoraTuning(model, Lora(rank=4, targets=[r"/.*\.1\.attn\.to_[qk]/", "ff.net.2"]), 0)
    adapted = {name.split(".lora")[0] for name in tuning.parameters()}
    blocks = len(model.transformer.transformer_blocks)
    assert adapted == {
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.to_k",
        *(f"transformer_blocks.{i}.ff.net.2" for i in range(blocks)),
    }
    move(tuning)
    tuning.export(tmp_path)
    fresh = model_of("digits")
    load_result(fresh, tmp_path)
    torch.testing.assert_close(velocity(fresh, "digits"), velocity(model, "digits"))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/attn.to_q/", "matches no projection of the model; near names are attn.to_q"),
        ("/attn.(to_q/", "is not a regular expression: missing \\), unterminated subpattern"),
    ],
)
def test_an_expression_that_finds_nothing_is_an_error(target: str, words: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"spec.model.lora.targets: .*{words}"):
        LoraTuning(model_of("digits"), Lora(targets=[target]), 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_reference_is_the_model_before_training_and_leaves_no_trace(
    family: str, kind: str
) -> None:
    model = model_of(family)
    base = velocity(model, family)
    tuning, policy = tuning_of(kind, model), policy_of(model)
    move(tuning)
    trained = velocity(model, family)
    assert not torch.allclose(trained, base, atol=1e-3)
    before = policy.evaluations["rollout"]
    with tuning.reference(policy) as reference:
        torch.testing.assert_close(velocity(model, family, reference), base, rtol=1e-5, atol=1e-6)
    assert torch.equal(velocity(model, family), trained)
    assert policy.evaluations["rollout"] == before + 2  # its work is counted like any other
    assert all(p.requires_grad for p in tuning.parameters().values())


def test_a_full_tuning_without_reference_says_so() -> None:
    model = model_of("digits")
    tuning = FullTuning(model, keep_reference=False)
    with pytest.raises(ValueError, match="no reference"), tuning.reference(policy_of(model)):
        pass


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_gradient_survives_the_reference(kind: str) -> None:
    """The reference is computed between forward and backward."""
    found = []
    for with_reference in (False, True):
        model = model_of("digits")
        tuning, policy = tuning_of(kind, model), policy_of(model)
        move(tuning)
        x, conditioning = seeds.normal((2, 1, 14, 14), 0, "x"), model.encode(PROMPTS)
        sigma = torch.tensor([0.9, 0.4])
        v = policy.velocity(x, sigma, conditioning, purpose="training")
        if with_reference:
            with torch.no_grad(), tuning.reference(policy) as reference:
                reference.velocity(x, sigma, conditioning, purpose="reference")
        v.square().sum().backward()
        grads = [p.grad.flatten() for p in tuning.parameters().values() if p.grad is not None]
        found.append(torch.cat(grads))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_exported_result_makes_the_same_model_again(
    tmp_path: Path, family: str, kind: str
) -> None:
    model = model_of(family)
    tuning = tuning_of(kind, model)
    move(tuning)
    tuning.export(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [
        layout.ADAPTER if kind == "lora" else layout.TRANSFORMER
    ]
    fresh = model_of(family)
    load_result(fresh, tmp_path)
    torch.testing.assert_close(
        velocity(fresh, family), velocity(model, family), rtol=1e-4, atol=1e-5
    )


def test_the_scale_of_the_update_travels_with_it(tmp_path: Path) -> None:
    """A loader that is not told takes alpha to be the rank: here a third of the update."""
    model = model_of("digits")
    base = velocity(model, "digits")
    tuning = LoraTuning(model, Lora(rank=4, alpha=12), 0)
    move(tuning, 0.02)
    tuning.export(tmp_path)
    fresh = model_of("digits")
    load_result(fresh, tmp_path)
    moved, expected = velocity(fresh, "digits") - base, velocity(model, "digits") - base
    assert float(moved.norm() / expected.norm()) == pytest.approx(1, abs=1e-3)


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="holds no result: expected adapter/"):
        load_result(model_of("digits"), tmp_path)


def test_values_are_set_for_a_while_even_if_that_fails() -> None:
    tuning = LoraTuning(model_of("digits"), LORA, 0)
    before = {name: p.detach().clone() for name, p in tuning.parameters().items()}
    other = {name: value + 1 for name, value in before.items()}

    def fail_inside() -> None:
        with tuning.values(other):
            assert all(torch.equal(p, other[n]) for n, p in tuning.parameters().items())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all(torch.equal(p, before[n]) for n, p in tuning.parameters().items())


def test_weights_of_another_model_are_refused() -> None:
    tuning = LoraTuning(model_of("digits"), LORA, 0)
    values = {name: p.detach().clone() for name, p in tuning.parameters().items()}
    name = next(iter(values))
    with pytest.raises(ValueError, match="weights are of another model"):
        tuning.assign({**values, "more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has shape \[1\], expected"):
        tuning.assign({**values, name: torch.zeros(1)})


def run_of_family(family: str, kind: str, dtype: torch.dtype) -> Run:
    spec: JobSpec = spec_of(
        {
            "model.tuning": kind,
            "model.lora": {"rank": 4} if kind == "lora" else None,
            "data.prompts": PROMPTS,
            "sampling": {"steps": 3, "width": 16, "height": 16, "guidanceScale": 2},
            "algorithm.promptsPerEpoch": 2,
            "algorithm.klCoefficient": 0.01,
            "rewards": [{"name": "digit-contrast"}],
        }
    )
    if family == "digits":
        sampling = spec.sampling.model_copy(update={"width": 14, "height": 14})
        spec = spec.model_copy(update={"sampling": sampling})
    model = model_of(family, dtype)
    return build_run(spec, model, load_prompts(spec), ALONE, CPU, lambda: False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_precision_trains_float32_weights(family: str, kind: str, dtype: torch.dtype) -> None:
    run = run_of_family(family, kind, dtype)
    before = {name: p.detach().clone() for name, p in run.tuning.parameters().items()}
    metrics = loop.run_epoch(run, 0)
    after = run.tuning.parameters()
    assert all(p.dtype == torch.float32 for p in after.values())
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(before[name], p) for name, p in after.items())
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert run.policy.evaluations["reference"] == 2 * 4 * 2  # groups, steps, guidance


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    tuning = LoraTuning(model_of("digits"), Lora(rank=4, alpha=8), 0)
    files = set()
    for number in range(8):
        tuning.export(tmp_path / str(number))
        files.add((tmp_path / str(number) / layout.ADAPTER / LORA_FILE).read_bytes())
    assert len(files) == 1
