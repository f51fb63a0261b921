"""ImageReward served by the package's own code, against the package and a second derivation."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.packages import serving
from tests.packages.image_reward_package import LETTERS, TEXT, VOCABULARY

pytestmark = pytest.mark.packages

MEAN, SPREAD = 0.16717362830052426, 1.0333394966054072


def pixels(file: str) -> Tensor:
    """The shorter side scaled to 224, the middle of the longer one."""
    picture: Image.Image = Image.open(file)
    shorter = min(picture.size)
    width, height = (224 * side // shorter for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    return serving.clip_pixels(picture.crop((left, top, left + 224, top + 224)))


def words(prompt: str) -> list[int]:
    """Its first 33 letters between [CLS] and [SEP], filled up to 35."""
    vocabulary = [*VOCABULARY, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    pieces: list[str] = []
    for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", prompt.lower()):
        pieces += [word[0], *(f"##{letter}" for letter in word[1:])]
    known = [p if p in vocabulary else "[UNK]" for p in pieces]
    found = ["[CLS]", *known[:33], "[SEP]"]
    return [vocabulary.index(p) for p in found] + [0] * (35 - len(found))


def renamed(
    weights: dict[str, Tensor], prefix: str, *changes: tuple[str, str]
) -> dict[str, Tensor]:
    """The weights below ``prefix`` by the names of transformers."""
    found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    for old, new in changes:
        found = {k.replace(old, new): v for k, v in found.items()}
    return found


def vision_of(weights: dict[str, Tensor]) -> Any:
    """transformers' BLIP: one layer 24 times, as all have the same weights here."""
    from transformers import BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel

    config = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=1,
        image_size=224,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    found = renamed(
        {k: v for k, v in weights.items() if not re.search(r"blocks\.([1-9])", k)},
        "blip.visual_encoder.",
        ("blocks.", "encoder.layers."),
        ("attn.qkv", "self_attn.qkv"),
        ("attn.proj", "self_attn.projection"),
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("patch_embed.proj", "embeddings.patch_embedding"),
    )
    found = {re.sub("^norm", "post_layernorm", name): value for name, value in found.items()}
    found["embeddings.class_embedding"] = found.pop("cls_token")
    found["embeddings.position_embedding"] = found.pop("pos_embed")
    model.load_state_dict(found)
    model.encoder.layers = torch.nn.ModuleList([model.encoder.layers[0]] * 24)
    return model.eval()


def text_of(weights: dict[str, Tensor]) -> Any:
    from transformers.models.blip.configuration_blip import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    config = BlipTextConfig(
        **{name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size")},
        num_attention_heads=TEXT["num_attention_heads"],
        num_hidden_layers=TEXT["num_hidden_layers"],
        max_position_embeddings=TEXT["max_position_embeddings"],
        encoder_hidden_size=1024,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        is_decoder=True,  # it has cross attention only so
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    found = renamed(weights, "blip.text_encoder.")
    del found["embeddings.position_ids"]  # no weights: 0, 1, 2, ...
    model.load_state_dict(found)
    return model.eval()


@torch.no_grad()
def derived(weights: dict[str, Tensor], pixels_N3HW: Tensor, words_NL: Tensor) -> Tensor:
    seen = vision_of(weights)(pixel_values=pixels_N3HW).last_hidden_state
    read = text_of(weights)(
        input_ids=words_NL,
        attention_mask=(words_NL != 0).long(),
        encoder_hidden_states=seen,
        is_decoder=False,
    )
    value: Tensor = read.last_hidden_state[:, 0].double()
    for layer in (0, 2, 4, 6, 7):
        weight, bias = (weights[f"mlp.layers.{layer}.{kind}"] for kind in ("weight", "bias"))
        value = value @ weight.double().T + bias.double()
    return ((value[:, 0] - MEAN) / SPREAD).float()


def test_what_is_served_is_what_the_package_and_a_second_derivation_say(tmp_path: Path) -> None:
    asked = serving.ask(tmp_path)
    kept = tmp_path / "image-reward"
    theirs = serving.package_says("image-reward", "image_reward_package.py", tmp_path, kept)
    pixels_N3HW = torch.stack([pixels(file) for file, _ in asked])
    words_NL = torch.tensor([words(prompt) for _, prompt in asked])
    torch.testing.assert_close(theirs["input.pixels"], pixels_N3HW)
    assert theirs["input.input_ids"].tolist() == words_NL.tolist()
    assert theirs["input.attention_mask"].tolist() == (words_NL != 0).long().tolist()

    weights = torch.load(kept / "ImageReward.pt", weights_only=True)
    expected = derived(weights, pixels_N3HW, words_NL)
    torch.testing.assert_close(theirs["scores"], expected, rtol=1e-4, atol=1e-4)
    assert expected.sort().values.diff().min() > 0.05  # so that no two are mistaken

    # As its image starts it: the model that the package knows by name, from what was fetched.
    with serving.served("image-reward", tmp_path) as url:
        ours = serving.scores("image-reward", url, asked)
    torch.testing.assert_close(ours, theirs["scores"], rtol=1e-5, atol=1e-5)
