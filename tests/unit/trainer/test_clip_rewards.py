"""PickScore, CLIPScore, the aesthetic score and HPSv2: tiny models of their architectures,
loaded by the code that loads the published ones, against second derivations."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import pretrained, registry
from tempflow_trainer.rewards.aesthetic import Aesthetic, Head
from tempflow_trainer.rewards.base import Place, as_floats
from tempflow_trainer.rewards.clip import Clip, ClipScore, PickScore, pictures
from tempflow_trainer.rewards.hpsv2 import HpsV2, fit_and_pad
from tests import tiny_scorers
from tests.tiny_scorers import CONTEXT, IMAGE_SIZE
from tests.unit.trainer.hub import COMMIT, Hub

PLACE = Place()
PROMPTS = ["a red dog", "a photo of a cat " * 20, "A RED  dog", "a red dog"]
SHAPES = [(32, 32), (48, 80), (90, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_scorers.save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder).eval()


def noise(count: int, height: int, width: int) -> Tensor:
    """8-bit images, as floats."""
    generator = torch.Generator().manual_seed(height)
    pixels = torch.randint(0, 256, (count, 3, height, width), generator=generator)
    return as_floats(pixels.to(torch.uint8))


def eight_bit(images_N3HW: Tensor) -> Any:
    """[N, H, W, 3] as picture files have it."""
    return (images_N3HW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def processed(folder: Path, images: Tensor, prompts: list[str]) -> Mapping[str, Tensor]:
    """What the model's own processor makes of it."""
    from transformers import CLIPProcessor

    found: Mapping[str, Tensor] = CLIPProcessor.from_pretrained(folder)(
        images=[Image.fromarray(one) for one in eight_bit(images)],
        text=prompts,
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=CONTEXT,
    )
    return found


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_the_network_sees_what_its_own_processor_makes(
    folder: Path, height: int, width: int
) -> None:
    clip = Clip.load(str(folder), str(folder), "", PLACE)
    images = noise(4, height, width)
    expected = processed(folder, images, PROMPTS)
    assert torch.equal(clip.pixels(pictures(images)), expected["pixel_values"])
    tokens = clip.tokens(PROMPTS)
    assert torch.equal(tokens["input_ids"], expected["input_ids"])
    assert torch.equal(tokens["attention_mask"], expected["attention_mask"])
    assert tokens["input_ids"].shape[1] == CONTEXT  # the long one was cut


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pickscore_and_clipscore_are_the_models_own_logits(
    folder: Path, model: Any, height: int, width: int
) -> None:
    images = noise(4, height, width)
    with torch.no_grad():
        logits = model(**processed(folder, images, PROMPTS)).logits_per_image.diag()
    pick = PickScore(str(folder), str(folder), place=PLACE).score(images, PROMPTS, [{}] * 4)
    torch.testing.assert_close(pick, logits, rtol=1e-5, atol=1e-5)
    by_26 = PickScore(str(folder), str(folder), divisor=26, place=PLACE)
    torch.testing.assert_close(by_26.score(images, PROMPTS, [{}] * 4), pick / 26)
    clip = ClipScore(str(folder), place=PLACE).score(images, PROMPTS, [{}] * 4)
    torch.testing.assert_close(clip, logits / 100, rtol=1e-5, atol=1e-7)
    assert len(set(pick.tolist())) == 4


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_aesthetic_score_is_one_matrix_product_of_the_features(
    folder: Path, model: Any, tmp_path: Path, suffix: str
) -> None:
    head = tiny_scorers.seeded(lambda: Head(24))
    # Without anything between the layers they are one affine map; the published names.
    weights = head.state_dict()
    assert list(weights)[::2] == [f"layers.{i}.weight" for i in (0, 2, 4, 6, 7)]
    file = tmp_path / f"head.{suffix}"
    if suffix == "pth":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    images = noise(3, 40, 64)
    with torch.no_grad():
        pixels = processed(folder, images, ["a"] * 3)["pixel_values"]
        features = model.visual_projection(model.vision_model(pixel_values=pixels)[1])
        expected = F.normalize(features)
        for index in (0, 2, 4, 6, 7):
            expected = expected @ weights[f"layers.{index}.weight"].T
            expected = expected + weights[f"layers.{index}.bias"]
    scorer = Aesthetic(str(folder), str(tmp_path), file.name, place=PLACE)
    found = scorer.score(images, ["any"] * 3, [{}] * 3)
    torch.testing.assert_close(found, expected[:, 0], rtol=1e-5, atol=1e-6)


def attention(x: Tensor, weights: Mapping[str, Tensor], name: str, mask: Tensor | None) -> Tensor:
    y = x.transpose(0, 1)
    found, _ = F.multi_head_attention_forward(
        y,
        y,
        y,
        embed_dim_to_check=x.shape[-1],
        num_heads=4,
        in_proj_weight=weights[f"{name}.in_proj_weight"],
        in_proj_bias=weights[f"{name}.in_proj_bias"],
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=weights[f"{name}.out_proj.weight"],
        out_proj_bias=weights[f"{name}.out_proj.bias"],
        training=False,
        need_weights=False,
        attn_mask=mask,
    )
    return found.transpose(0, 1)


def tower(x: Tensor, weights: Mapping[str, Tensor], prefix: str, mask: Tensor | None) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    for layer in (0, 1):
        block = f"{prefix}transformer.resblocks.{layer}"
        x = x + attention(norm(x, f"{block}.ln_1"), weights, f"{block}.attn", mask)
        y = norm(x, f"{block}.ln_2")
        y = y @ weights[f"{block}.mlp.c_fc.weight"].T + weights[f"{block}.mlp.c_fc.bias"]
        y = F.gelu(y) @ weights[f"{block}.mlp.c_proj.weight"].T
        x = x + y + weights[f"{block}.mlp.c_proj.bias"]
    return x


def open_clip_cosines(weights: Mapping[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """open_clip's forward, written from its tensors alone."""
    patches = F.conv2d(pixels, weights["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    first = weights["visual.class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([first, patches], dim=1) + weights["visual.positional_embedding"]
    x = F.layer_norm(x, (32,), weights["visual.ln_pre.weight"], weights["visual.ln_pre.bias"])
    x = tower(x, weights, "visual.", None)[:, 0]
    x = F.layer_norm(x, (32,), weights["visual.ln_post.weight"], weights["visual.ln_post.bias"])
    seen = F.normalize(x @ weights["visual.proj"])
    length = ids.shape[1]
    y = weights["token_embedding.weight"][ids] + weights["positional_embedding"][:length]
    y = tower(y, weights, "", torch.full((length, length), -torch.inf).triu(1))
    y = F.layer_norm(y, (32,), weights["ln_final.weight"], weights["ln_final.bias"])
    y = y[torch.arange(len(y)), ids.argmax(dim=1)]
    return (seen * F.normalize(y @ weights["text_projection"])).sum(dim=1)


def open_clip_pixels(images_N3HW: Tensor) -> Tensor:
    """What open_clip's transform makes of pictures: ResizeMaxSize, padding with 0 on both sides
    (the odd pixel right and below), and OpenAI's mean and deviation; written from its code."""
    found = []
    for picture in (Image.fromarray(one) for one in eight_bit(images_N3HW)):
        scale = IMAGE_SIZE / max(picture.height, picture.width)
        height, width = (round(side * scale) for side in (picture.height, picture.width))
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        pixels_3HW = torch.tensor(np.array(resized)).permute(2, 0, 1).float() / 255
        down, across = IMAGE_SIZE - height, IMAGE_SIZE - width
        sides = (across // 2, across - across // 2, down // 2, down - down // 2)
        found.append(F.pad(pixels_3HW, sides))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (torch.stack(found) - mean) / deviation


@pytest.fixture(scope="module")
def hps_folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = tmp_path_factory.mktemp("hps")
    torch.save({"epoch": 1, "state_dict": tiny_scorers.open_clip_layout(model)}, weights / "hps.pt")
    return weights


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_hpsv2_is_open_clips_cosine_on_the_whole_picture(
    folder: Path, hps_folder: Path, model: Any, height: int, width: int
) -> None:
    scorer = HpsV2(str(hps_folder), "hps.pt", str(folder), place=PLACE)
    images = noise(4, height, width)
    found = scorer.score(images, PROMPTS, [{}] * 4)
    weights = tiny_scorers.open_clip_layout(model)
    ids = processed(folder, images, PROMPTS)["input_ids"]
    expected = open_clip_cosines(weights, open_clip_pixels(images), ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert set(weights) == set(torch.load(hps_folder / "hps.pt", weights_only=True)["state_dict"])


@pytest.mark.parametrize(
    ("size", "inside"),
    [((64, 32), (0, 8, 32, 24)), ((20, 50), (9, 0, 22, 32)), ((32, 32), (0, 0, 32, 32))],
)
def test_the_longer_side_is_fitted_and_the_rest_is_black(
    size: tuple[int, int], inside: tuple[int, int, int, int]
) -> None:
    padded = fit_and_pad(Image.new("RGB", size, "white"), IMAGE_SIZE)
    assert padded.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert padded.getbbox() == inside
    assert padded.crop(inside).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("pickscore", {"model": "./nowhere"}, "no folder 'nowhere'; expected a folder"),
        ("aesthetic", {"head_file": "gone.pth"}, "there is no gone.pth in"),
        ("aesthetic", {"head_file": "config.json"}, "config.json cannot be read"),
        ("aesthetic", {"head_file": "model.safetensors"}, "model.safetensors of "),
        ("hpsv2", {"weights_file": "model.safetensors"}, "no tensor of a CLIP in the layout of"),
        ("hpsv2", {"model": "./nowhere"}, "no folder 'nowhere'"),
        ("clipscore", {"model": "EMPTY"}, "cannot be loaded as CLIPModel: "),
    ],
)
def test_files_that_are_missing_or_wrong_are_named(
    folder: Path, tmp_path: Path, name: str, parameters: dict[str, str], message: str
) -> None:
    given = {"model": str(folder)}
    if name == "pickscore":
        given["processor"] = str(folder)
    if name in ("aesthetic", "hpsv2"):
        given["head" if name == "aesthetic" else "weights"] = str(folder)
    given |= parameters
    given = {key: str(tmp_path) if value == "EMPTY" else value for key, value in given.items()}
    with pytest.raises(ModelUnavailable) as caught:
        registry.build([RewardTerm(name=name, parameters=given)])
    assert str(caught.value).startswith(f"spec.rewards[0]: {name}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Harmful()}, tmp_path / "head.pth")
    with pytest.raises(ModelUnavailable, match=r"head\.pth cannot be read"):
        pretrained.weights(str(tmp_path), "head.pth", "", PLACE)
    assert not (tmp_path / "ran").exists()


# The client reads the address of the hub when it is imported: a process of its own.
ASK_THE_HUB = """
import json, sys, time
time.sleep = lambda _seconds: None
from tempflow_api.errors import TempFlowError
from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import registry
for given in json.loads(sys.argv[1]):
    try:
        registry.build([RewardTerm(name="aesthetic", parameters=given)])
        print("loaded")
    except TempFlowError as error:
        print(error)
"""


@pytest.mark.slow
def test_models_of_the_hub_and_what_it_refuses(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    for name in ("owner/clip", "owner/gated"):
        shutil.copytree(folder, root / name)
    (root / "owner/head").mkdir()
    head = tiny_scorers.seeded(lambda: Head(24))
    torch.save(head.state_dict(), root / "owner/head/head.pth")
    plain = {"model": "owner/clip", "head": "owner/head", "head_file": "head.pth"}
    cases = [
        (plain | {"revision": COMMIT, "head_revision": "main"}, "loaded"),
        (plain | {"model": "owner/gated"}, "its licence has to be accepted at"),
        (plain | {"model": "owner/none"}, "there is no such model at"),
        (plain | {"revision": "v9"}, "it has no revision 'v9': see the reward's revision"),
        (plain | {"head_file": "tail.pth"}, "owner/head gives no tail.pth: it has no tail.pth"),
        (
            plain | {"model": "owner/head"},
            "owner/head cannot be loaded as CLIPModel: owner/head does not appear to have",
        ),
    ]
    hub = Hub(root, gated={"owner/gated"})
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_THE_HUB, json.dumps([given for given, _ in cases])],
            capture_output=True,
            text=True,
            check=False,
            env={k: v for k, v in os.environ.items() if not k.startswith("HF_")}
            | {
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(tmp_path / "cache"),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )
    finally:
        hub.close()
    answers = done.stdout.splitlines()
    assert len(answers) == len(cases), done.stderr
    for answer, (_, expected) in zip(answers, cases, strict=True):
        assert expected in answer
