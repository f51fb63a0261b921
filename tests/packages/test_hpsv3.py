"""HPSv3 served by the package's own code, against the package and a second derivation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.packages import serving
from tests.packages.hpsv3_package import BASE, SPECIAL, WEIGHTS, letters

pytestmark = pytest.mark.packages

MARKS = {mark: 256 + number for number, mark in enumerate([*SPECIAL, "<|Reward|>"])}
IMAGE, REWARD = MARKS["<|image_pad|>"], MARKS["<|Reward|>"]
BEGIN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)
END = """
Please provide the overall ratings of this image: <|Reward|>

END
<|im_end|>
<|im_start|>assistant
"""


def size_of(width: int, height: int) -> tuple[int, int]:
    """Multiples of 28, of the picture's shape and about 256 * 28 * 28 pixels: no more where it has
    to shrink, no fewer where it has to grow."""
    area = 256 * 28 * 28
    now = (28 * round(width / 28)) * (28 * round(height / 28))
    if now == area:
        return 28 * round(width / 28), 28 * round(height / 28)
    scale = math.sqrt(area / (width * height))
    fit = math.floor if now > area else math.ceil
    return 28 * fit(width * scale / 28), 28 * fit(height * scale / 28)


def patches(file: str) -> tuple[Tensor, tuple[int, int]]:
    """Patches of 14 x 14 pixels as Qwen2-VL reads them: four that become one token together, each
    twice, as two frames of a video; and how many there are, down and across."""
    picture = Image.open(file)
    width, height = size_of(*picture.size)
    pixels_3HW = serving.clip_pixels(picture.resize((width, height), Image.Resampling.BICUBIC))
    down, across = height // 14, width // 14
    parts = pixels_3HW.view(3, down // 2, 2, 14, across // 2, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    frames = parts.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1)
    return frames.reshape(down * across, -1), (down, across)


def text_in(numbers: list[int]) -> str:
    """What the numbers of the tokens stand for."""
    signs = {number: mark.encode() for mark, number in MARKS.items()}
    signs |= {number: bytes([byte]) for number, byte in enumerate(letters())}
    return b"".join(signs[number] for number in numbers).decode()


def base_of(folder: Path, weights: dict[str, Tensor]) -> Any:
    """The model below the reward's head, by the trainer's own transformers, which is much newer."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(weights["model.embed_tokens.weight"])
    below = {k: v.float() for k, v in weights.items() if not k.startswith("rm_head")}
    model, found = Qwen2VLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=below, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, buffer in model.named_buffers():
        # The package makes bfloat16 of all that it loads, of the rotations' speeds too.
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())
    return model.model.eval()


@torch.no_grad()
def derived(base: Any, weights: dict[str, Tensor], file: str, numbers: list[int]) -> Tensor:
    """(mu, sigma) of one picture by itself: nothing is filled up."""
    pixels, (down, across) = patches(file)
    # Places count plainly, as the package's transformers did without generating.
    places = torch.arange(len(numbers)).expand(3, 1, -1)
    out = base(
        input_ids=torch.tensor([numbers]),
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, down, across]]),
        position_ids=places,
    )
    value: Tensor = out.last_hidden_state[0, numbers.index(REWARD)]
    for layer in (0, 3, 5):
        value = value @ weights[f"rm_head.{layer}.weight"].T + weights[f"rm_head.{layer}.bias"]
        value = value.relu() if layer != 5 else value
    return value


def check_inputs(theirs: dict[str, Tensor], asked: list[tuple[str, str]]) -> list[list[int]]:
    """The package's input is the one derived here, and every prompt is in it whole; the tokens."""
    found = [patches(file) for file, _ in asked]
    torch.testing.assert_close(theirs["input.pixel_values"], torch.cat([p for p, _ in found]))
    sizes = [[1, down, across] for _, (down, across) in found]
    assert theirs["input.image_grid_thw"].tolist() == sizes
    tokens, instructions = [], set()
    for row, mask, (_, prompt), (_, down, across) in zip(
        theirs["input.input_ids"], theirs["input.attention_mask"], asked, sizes, strict=True
    ):
        length = int(mask.sum())
        assert mask[:length].all()
        assert (row[length:] == MARKS["<|endoftext|>"]).all()
        tokens.append(row[:length].tolist())
        assert tokens[-1].count(IMAGE) == down * across // 4
        text = text_in(tokens[-1])
        assert text.startswith(BEGIN)
        assert text.endswith(f"Textual prompt - {prompt}\n\n\n{END}")
        instruction = text.replace("<|image_pad|>", "").removesuffix(f"{prompt}\n\n\n{END}")
        instructions.add(instruction)
    assert len(instructions) == 1
    return tokens


def test_what_is_served_is_what_the_package_and_a_second_derivation_say(tmp_path: Path) -> None:
    asked = serving.ask(tmp_path)
    theirs = serving.package_says("hpsv3", "hpsv3_package.py", tmp_path)
    tokens = check_inputs(theirs, asked)

    [base] = (tmp_path / "hub").glob(f"models--{BASE.replace('/', '--')}/snapshots/*")
    [file] = (tmp_path / "hub").glob(f"models--{WEIGHTS.replace('/', '--')}/snapshots/*/*")
    weights = load_file(file)
    model = base_of(base, weights)
    expected = torch.stack(
        [
            derived(model, weights, picture, numbers)
            for (picture, _), numbers in zip(asked, tokens, strict=True)
        ]
    )
    torch.testing.assert_close(theirs["logits"], expected, rtol=1e-3, atol=1e-3)
    assert expected[:, 0].sort().values.diff().min() > 0.05  # so that no two are mistaken

    # As its image starts it: the weights that the package fetches by name.
    with serving.served("hpsv3", tmp_path) as url:
        ours = serving.scores("hpsv3", url, asked)
        torch.testing.assert_close(ours, theirs["logits"][:, 0], rtol=1e-3, atol=1e-3)
        marked = [(asked[0][0], "a dog <|Reward|>"), *asked[:2]]
        beside = serving.scores("hpsv3", url, marked)
        assert beside[0].isnan()
        torch.testing.assert_close(beside[1:], ours[:2], rtol=1e-3, atol=1e-3)
