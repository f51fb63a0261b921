"""What every family of models must do, each as a tiny random model beside its own pipeline."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from tempflow.manifest import parse_text
from tempflow.presets import all_presets
from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import Lora
from tempflow_trainer import loop, main
from tempflow_trainer.algorithm import sde, weighting
from tempflow_trainer.data import load_prompts
from tempflow_trainer.loop import Run
from tempflow_trainer.models import families, packed
from tempflow_trainer.models.base import Conditioning, FlowModel
from tempflow_trainer.models.families.qwen_image import QwenImage
from tempflow_trainer.models.families.sd3 import Sd3
from tempflow_trainer.models.skeleton import skeleton
from tempflow_trainer.models.tuning import LoraTuning, load_result
from tests import tiny_models
from tests.unit.trainer.family_cases import (
    ALONE,
    CPU,
    DIGITS,
    FLUX,
    KLEIN,
    MAX_TEXT_TOKENS,
    PROMPTS,
    QWEN,
    SD3,
    STEPS,
    VARIANTS,
    Case,
    plain_pipeline,
    starts,
)

# Float32 sums in another order: 8e-7 measured over all families and sizes; guidance, a prompt or
# the scale of an adapter change images by 1e-3 and more.
SAME = 5e-6
WITH_PIPELINE = [SD3, FLUX, QWEN, KLEIN]
EVERY = [DIGITS, *WITH_PIPELINE]
SIZES = [(32, 32), (48, 48), (16, 32), (48, 16)]

every_family = pytest.mark.parametrize("case", EVERY, ids=str)
every_pipeline = pytest.mark.parametrize("case", WITH_PIPELINE, ids=str)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny models are saved once for all tests."""
    return tmp_path_factory.mktemp("families")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=SAME)


def sigmas(*values: float) -> Tensor:
    return torch.tensor(values)


@torch.no_grad()
def velocity(case: Case, model: FlowModel, x: Tensor, s: Tensor, read: Conditioning) -> Tensor:
    """The network's own velocity, without classifier-free guidance."""
    return model.velocity(x, s, model.embed_guidance(read, case.guidance))


@every_family
def test_shapes(case: Case, folders: Path) -> None:
    model, (height, width) = case.load(folders), case.size()
    x, read = starts(model, height, width, 3), model.encode([*PROMPTS, PROMPTS[0]])
    assert {len(tensor) for tensor in read.tensors.values()} == {3}
    numbers = {n: tuple(t.shape[1:]) for n, t in read.tensors.items() if t.is_floating_point()}
    assert numbers == model.text_shapes()
    assert velocity(case, model, x, sigmas(0.9, 0.5, 0.1), read).shape == x.shape
    images = model.decode(x)
    assert (images.shape, images.dtype) == ((3, 3, height, width), torch.float32)
    assert 0 <= float(images.min()) < float(images.max()) <= 1


@every_family
def test_a_row_does_not_depend_on_the_others(case: Case, folders: Path) -> None:
    """Nor on how many there are: each has its noise level, prompt and guidance."""
    model = case.load(folders)
    x, read = starts(model, *case.size(), count=3), model.encode([*PROMPTS, PROMPTS[0]])
    s = sigmas(0.9, 0.5, 0.1)
    together = velocity(case, model, x, s, read)
    for i in range(3):
        row = torch.tensor([i])
        alone = velocity(case, model, x[row], s[row], read.rows(row))
        assert_same(together[row], alone)
    other_prompts = velocity(case, model, x[[0, 0]], s[[0, 0]], read.rows(torch.tensor([0, 1])))
    assert float(other_prompts.diff(dim=0).abs().max()) > 1e-3


@every_family
def test_prompts_encoded_apart_can_be_joined(case: Case, folders: Path) -> None:
    """As a prompt is with the negative prompt; their lengths in tokens differ."""
    model = case.load(folders)
    together = model.encode(PROMPTS)
    joined = model.encode(PROMPTS[:1]).join(model.encode(PROMPTS[1:]))
    for name, tensor in together.tensors.items():
        torch.testing.assert_close(joined.tensors[name], tensor, rtol=0, atol=1e-5)


@every_family
def test_guidance_counts_the_rows_it_costs(case: Case, folders: Path) -> None:
    model = case.load(folders)
    x, read = starts(model, *case.size()), model.encode(PROMPTS)
    found = {}
    for scale in (1.0, case.guidance):
        policy = case.policy(model, scale)
        with torch.no_grad():
            found[scale] = policy.velocity(x, sigmas(0.7, 0.7), read, purpose="rollout")
        twice = model.classifier_free and scale != 1
        assert policy.evaluations["rollout"] == (4 if twice else 2)
    assert not torch.allclose(found[1.0], found[case.guidance], rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("case", "size"),
    [(c, s) for c in WITH_PIPELINE for s in SIZES] + [(c, SIZES[2]) for c in VARIANTS],
    ids=str,
)
def test_sampling_is_what_the_pipeline_does(
    case: Case, size: tuple[int, int], folders: Path
) -> None:
    model, pipeline = case.load(folders), plain_pipeline(case, folders)
    x = starts(model, *size)
    theirs = case.its_images(pipeline, x, *size)
    assert_same(case.our_images(model, x, *size), theirs)
    set_by_the_call = pipeline.scheduler.sigmas.double()
    assert torch.equal(model.schedule(STEPS, *size).sigmas, set_by_the_call)


@every_pipeline
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_network_is_asked_at_the_levels_of_the_pipeline(
    case: Case, precision: str, folders: Path
) -> None:
    """Bit for bit, in half precision too."""
    model, pipeline = case.load(folders, precision), plain_pipeline(case, folders)
    pipeline.to(getattr(torch, precision))
    x, size = starts(model, *case.size()), case.size()
    asked: dict[str, list[float]] = {"ours": [], "theirs": []}

    def note(who: str) -> Callable[..., None]:
        return lambda _module, _args, given: asked[who].append(float(given["timestep"][0]))

    model.transformer.register_forward_pre_hook(note("ours"), with_kwargs=True)
    pipeline.transformer.register_forward_pre_hook(note("theirs"), with_kwargs=True)
    case.our_images(model, x, *size)
    case.its_images(pipeline, x, *size)
    calls = len(asked["theirs"]) // STEPS  # Qwen-Image's pipeline runs the two prompts in turn
    assert asked["ours"] == asked["theirs"][::calls]


def test_packing_is_the_pipelines() -> None:
    x = torch.randn(2, 4, 6, 10)
    for pipeline in (tiny_models.flux_pipeline(), tiny_models.qwen_pipeline()):
        assert torch.equal(packed.pack(x), pipeline._pack_latents(x, *x.shape))
    assert torch.equal(packed.unpack(packed.pack(x), 6, 10), x)


@pytest.mark.parametrize(
    ("pipeline", "tokens", "noise_level", "constant"),
    [
        (tiny_models.sd3_pipeline, 1024, 0.7, 2.2522),
        (tiny_models.flux_pipeline, 4096, 0.9, 1.7260),
        (tiny_models.flux_pipeline, 1024, 0.9, 1.9291),
        (tiny_models.qwen_pipeline, 1024, 1.2, 1.5329),
    ],
)
def test_schedules_give_the_constants_of_the_reference_code(
    pipeline: Callable[[], Any], tokens: int, noise_level: float, constant: float
) -> None:
    """2.25, 1.73 and 1.53 are 1 / mean noise of the trained steps (arXiv 2508.04324); a wrong
    shift, grid or end of a schedule moves them."""
    scheduler = pipeline().scheduler
    schedule = packed.shifted_schedule(scheduler, 10, tokens)
    if not scheduler.config.use_dynamic_shifting:
        schedule = Sd3(pipeline(), max_text_tokens=MAX_TEXT_TOKENS).schedule(10, 512, 512)
    noise_T = sde.noise_std_T(schedule, noise_level)
    assert 1 / float(noise_T[:9].mean()) == pytest.approx(constant, abs=5e-5)
    trained = sde.transitions("flow", schedule, noise_level, range(9))
    weights = weighting.weights_S("noise-aware", trained)
    torch.testing.assert_close(weights.double(), noise_T[:9].double() * constant, rtol=1e-4, atol=0)


def build(case: Case, folders: Path, **kinds: str) -> tuple[FlowModel, Run]:
    spec = case.spec(folders, **kinds)
    model = case.load(folders, kinds.get("precision", "float32"))
    return model, main.build_run(spec, model, load_prompts(spec), ALONE, CPU, lambda: False)


def copy_of(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


KINDS = [("lora", "float32"), ("lora", "bfloat16"), ("full", "bfloat16")]


@pytest.mark.parametrize(
    ("case", "tuning", "precision"),
    [(case, *kind) for case in EVERY for kind in KINDS] + [(SD3, "lora", "float16")],
    ids=str,
)
def test_an_epoch_changes_what_is_trained(
    case: Case, tuning: str, precision: str, folders: Path
) -> None:
    """Rollout, scoring and update, built as a rank builds them."""
    model, run = build(case, folders, precision=precision, tuning=tuning)
    trained = copy_of(run.tuning.parameters())
    everything = copy_of(dict(model.transformer.named_parameters()))
    loop.run_epoch(run, epoch=0)
    parameters = run.tuning.parameters()
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    now = dict(model.transformer.named_parameters())
    changed = {name for name in everything if not torch.equal(everything[name], now[name])}
    # Not all: nobody reads what the last block does to the text.
    learned = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    assert learned <= changed <= trained.keys()
    assert len(learned) > len(trained) / 3  # at first an update has a gradient in one factor only


@pytest.mark.parametrize("case", WITH_PIPELINE + VARIANTS, ids=str)
def test_an_exported_adapter_means_the_same_to_the_pipeline(
    case: Case, folders: Path, tmp_path: Path
) -> None:
    """To our own loader, too. Alpha is thrice the rank: a loader that lost it would differ."""
    model, run = build(case, folders)
    torch.manual_seed(0)
    tuned = {n: 0.2 * torch.randn_like(p) for n, p in run.tuning.parameters().items()}
    size = case.size()
    x = starts(model, *size)
    before = case.our_images(model, x, *size)
    run.tuning.assign(tuned)
    ours = case.our_images(model, x, *size)
    assert float((ours - before).abs().max()) > 1e-2
    run.tuning.export(tmp_path)
    pipeline = plain_pipeline(case, folders)
    pipeline.load_lora_weights(tmp_path / "adapter")
    assert_same(case.its_images(pipeline, x, *size), ours)
    fresh = case.load(folders)
    load_result(fresh, tmp_path)
    assert_same(case.our_images(fresh, x, *size), ours)


@every_family
def test_an_exported_transformer_means_the_same_to_our_loader(
    case: Case, folders: Path, tmp_path: Path
) -> None:
    """All weights were trained in float32 beside text in half precision, and stay so."""
    model, run = build(case, folders, tuning="full", precision="bfloat16")
    tuned = {n: 1.1 * p.detach() for n, p in run.tuning.parameters().items()}
    run.tuning.assign(tuned)
    run.tuning.export(tmp_path)
    fresh = case.load(folders, "bfloat16")
    load_result(fresh, tmp_path)
    x, read, s = starts(model, *case.size()), model.encode(PROMPTS), sigmas(0.7, 0.7)
    assert_same(velocity(case, fresh, x, s, read), velocity(case, model, x, s, read))


@every_pipeline
def test_half_precision_is_near(case: Case, folders: Path) -> None:
    exact, half = case.load(folders), case.load(folders, "bfloat16")
    x, s = starts(exact, *case.size()), sigmas(0.7, 0.2)
    expected = velocity(case, exact, x, s, exact.encode(PROMPTS))
    found = velocity(case, half, x, s, half.encode(PROMPTS))
    assert found.dtype == torch.bfloat16
    # 8 bits of mantissa: 0.4 % a rounding.
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05


@every_family
def test_an_unknown_target_is_an_error(case: Case, folders: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"'attn\.to_qq' matches no projection.*attn\.to_q"):
        LoraTuning(case.load(folders), Lora(targets=["attn.to_v", "attn.to_qq"]), 0)


@every_pipeline
def test_another_kind_of_model_is_an_error(case: Case, folders: Path) -> None:
    other = WITH_PIPELINE[WITH_PIPELINE.index(case) - 1]
    spec = case.spec(folders)
    wrong = spec.model.model_copy(update={"source": other.source(folders)})
    with pytest.raises(
        ModelUnavailable, match=r"source: \S+ cannot be loaded as \w+: it is a \w+; see"
    ):
        families.load(wrong, cache=folders, device=CPU)


def test_qwen_image_does_not_see_padding(folders: Path) -> None:
    """Neither its amount nor its content."""
    model = QWEN.load(folders)
    assert isinstance(model, QwenImage)
    read = model.encode(PROMPTS)
    hidden, mask = read.tensors["encoder_hidden_states"], read.tensors["encoder_hidden_states_mask"]
    assert mask.shape == (2, MAX_TEXT_TOKENS)
    assert mask.sum(dim=1).tolist() == [20, 21]  # letters of the prompt, 13 of the template
    x, s = starts(model, 32, 32), sigmas(0.7, 0.7)
    clean = velocity(QWEN, model, x, s, read)
    noisy = {**read.tensors, "encoder_hidden_states": hidden + (~mask)[..., None] * 9.0}
    assert_same(velocity(QWEN, model, x, s, Conditioning(noisy)), clean)
    unmasked = {**noisy, "encoder_hidden_states_mask": torch.ones_like(mask)}
    assert not torch.allclose(velocity(QWEN, model, x, s, Conditioning(unmasked)), clean)
    short = Conditioning({name: tensor[:, :21] for name, tensor in read.tensors.items()})
    assert_same(velocity(QWEN, model, x, s, short), clean)


def test_qwen_image_cuts_long_prompts(folders: Path) -> None:
    read = QWEN.load(folders).encode([PROMPTS[0], "a three " * 20])
    mask = read.tensors["encoder_hidden_states_mask"]
    assert mask.sum(dim=1).tolist() == [20, MAX_TEXT_TOKENS]
    full = QWEN.load(folders).encode(["a three " * 20])
    assert bool(full.tensors["encoder_hidden_states_mask"].all())


def test_qwen_image_keeps_the_norm_of_every_token(folders: Path) -> None:
    model = QWEN.load(folders)
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 3, 4, 6, 8, generator=generator)
    tokens = packed.pack(model.combine(conditional, unconditional, 4.0))
    plain = packed.pack(FlowModel.combine(model, conditional, unconditional, 4.0))
    norm = packed.pack(conditional).norm(dim=-1)
    torch.testing.assert_close(tokens.norm(dim=-1), norm)
    along = torch.nn.functional.cosine_similarity(tokens, plain, dim=-1)
    torch.testing.assert_close(along, torch.ones_like(along))
    assert not torch.allclose(tokens, plain)


def test_flux_without_an_input_for_guidance_ignores_it(folders: Path) -> None:
    """As FLUX.1-schnell."""
    model = FLUX.load(folders)
    read = model.encode(PROMPTS)
    assert model.embed_guidance(read, 3.5).tensors["guidance"].tolist() == [3.5, 3.5]
    model.transformer.register_to_config(guidance_embeds=False)
    assert model.embed_guidance(read, 3.5) is read


def full_size(kind: Callable[..., torch.nn.Module], **config: object) -> Any:
    """A published transformer without memory for its weights."""
    with torch.device("meta"):
        return kind(**config)


def sd35(**config: object) -> Any:
    """Values of diffusers' scripts/convert_sd3_to_diffusers.py."""
    common = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "qk_norm": "rms_norm",
    }
    return full_size(SD3Transformer2DModel, **common, **config)


def sd35_medium() -> Any:
    return sd35(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
    )


def sd35_large() -> Any:
    return sd35(
        num_layers=38,
        num_attention_heads=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
    )


def flux_dev() -> Any:
    """diffusers' defaults are FLUX.1's; the input for guidance is what makes it FLUX.1-dev."""
    return full_size(FluxTransformer2DModel, guidance_embeds=True)


def qwen_image() -> Any:
    """diffusers' defaults are Qwen-Image's."""
    return full_size(QwenImageTransformer2DModel)


ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
OF_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


def projections(blocks: str, count: int, *groups: tuple[str, ...]) -> set[str]:
    """Of every block of a list."""
    return {f"{blocks}.{i}.{name}" for i in range(count) for group in groups for name in group}


def sd3_projections(blocks: int) -> set[str]:
    """The text stream of the last block has no output."""
    last = f"transformer_blocks.{blocks - 1}.attn.to_add_out"
    return projections("transformer_blocks", blocks, ATTENTION, OF_TEXT) - {last}


def feed_forward(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.net.{layer}" for name in names for layer in ("0.proj", "2"))


PUBLISHED = {
    "stabilityai/stable-diffusion-3.5-medium": (
        sd35_medium,
        2_243_171_520,
        sd3_projections(24),
    ),
    "black-forest-labs/FLUX.1-dev": (
        flux_dev,
        11_901_408_320,
        projections("transformer_blocks", 19, ATTENTION, OF_TEXT, feed_forward("ff", "ff_context"))
        | projections("single_transformer_blocks", 38, ATTENTION[:3]),
    ),
    "Qwen/Qwen-Image": (
        qwen_image,
        20_430_401_088,
        projections(
            "transformer_blocks", 60, ATTENTION, OF_TEXT, feed_forward("img_mlp", "txt_mlp")
        ),
    ),
}


def assert_adapts(model: FlowModel, expected: set[str], folder: Path) -> None:
    """The names in the exported file are those of the projections, two tensors each."""
    tuning = LoraTuning(model, Lora(rank=1), 0)
    tuning.export(folder, {name: torch.zeros(1) for name in tuning.parameters()})
    [file] = folder.glob("adapter/*.safetensors")
    found = load_file(file).keys()
    assert found == {f"transformer.{p}.lora_{ab}.weight" for p in expected for ab in "AB"}


@pytest.mark.parametrize("source", PUBLISHED)
def test_presets_train_the_published_models(source: str, tmp_path: Path) -> None:
    """By the configurations that ship with the package, which are the libraries' own values."""
    build_transformer, parameters, expected = PUBLISHED[source]
    specs = [parse_text(found.text, found.name).job.spec for found in all_presets()]
    models = [spec.model for spec in specs if spec.model.source == source]
    assert models
    published = skeleton(models[0]).model
    assert sum(p.numel() for p in published.transformer.parameters()) == parameters
    mine, theirs = build_transformer().config, published.transformer.config
    for name in (name for name in mine if not name.startswith("_")):
        assert json.dumps(theirs[name]) == json.dumps(mine[name]), name  # tuples are lists there
    targets = {tuple(m.lora.targets or published.lora_targets) for m in models if m.lora}
    assert targets == {published.lora_targets}
    assert_adapts(published, expected, tmp_path)


def test_the_large_model_of_a_family_has_the_same_names(tmp_path: Path) -> None:
    pipeline = tiny_models.sd3_pipeline()
    pipeline.transformer = sd35_large()
    model = Sd3(pipeline, max_text_tokens=MAX_TEXT_TOKENS)
    assert sum(p.numel() for p in model.transformer.parameters()) == 8_056_627_520
    assert_adapts(model, sd3_projections(38), tmp_path)
