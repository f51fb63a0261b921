"""Text in pictures: the real engine on rendered text, and the distance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tempflow_api.errors import RewardFailed
from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import registry
from tempflow_trainer.rewards.base import Reward
from tempflow_trainer.rewards.ocr import similarity, wanted_text

law = settings(max_examples=50, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def ocr() -> Reward:
    return registry.build([RewardTerm(name="ocr")])


def written(*lines: str, colour: str = "black", ground: str = "white") -> Tensor:
    picture = Image.new("RGB", (384, 160), ground)
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        font = ImageFont.load_default(size=44)
        pen.text((24, 16 + 64 * number), line, fill=colour, font=font)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(160, 384, 3).permute(2, 0, 1)


def test_it_reads_what_is_written(ocr: Reward) -> None:
    pictures = [
        written("Hello World"),
        written("Open 24 hours", colour="yellow", ground="navy"),
        written("first line", "second line"),
        written("Hello World"),
        written(),
        written("NEW YORK"),
    ]
    prompts = [
        'a sign that says "Hello World"',
        'a neon sign "open 24 HOURS", at night',
        'a page with "First line second line"',
        'a sign that says "Hollo World"',
        'a sign that says "Hello"',
        "a sign that says “New York”",
    ]
    scores = ocr.score(torch.stack(pictures), prompts, [{}] * len(prompts))["ocr"]
    assert scores.tolist() == pytest.approx([1, 1, 1, 0.9, 0, 1])


def test_the_text_may_stand_in_the_metadata(ocr: Reward) -> None:
    images = written("Hello World")[None]
    assert ocr.score(images, ['a sign "Nothing"'], [{"text": "hello"}])["ocr"].tolist() == [1.0]


def test_a_prompt_without_text_to_look_for_is_a_mistake_in_the_prompt_list(ocr: Reward) -> None:
    with pytest.raises(RewardFailed, match="reward ocr: no text to look for in prompt 'a sign'"):
        ocr.score(written("x")[None], ["a sign"], [{}])


@pytest.mark.parametrize(
    ("read", "wanted", "expected"),
    [
        ("Hello World", "hello world", 1.0),
        ("helloworld", "Hello World", 1.0),
        ("well, hello world!", "hello", 1.0),
        ("", "hello", 0.0),
        ("jello", "hello", 0.8),
        ("completely different", "abc", 0.0),
        ("kitten", "sitting", 1 - 3 / 7),
    ],
)
def test_the_distance(read: str, wanted: str, expected: float) -> None:
    assert similarity(read, wanted) == pytest.approx(expected)


def edits(a: str, b: str) -> int:
    """Levenshtein's distance by the table of its definition."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above = [i]
        for j, y in enumerate(b, 1):
            above.append(min(row[j] + 1, above[-1] + 1, row[j - 1] + (x != y)))
        row = above
    return row[-1]


@law
@given(read=st.text("abc", max_size=8), wanted=st.text("abc", min_size=1, max_size=8))
def test_the_distance_by_its_definition(read: str, wanted: str) -> None:
    distance = 0 if wanted in read else edits(read, wanted)
    expected = 1 - min(distance, len(wanted)) / len(wanted)
    assert similarity(read, wanted) == pytest.approx(expected)


def test_the_first_quoted_text_is_meant() -> None:
    assert wanted_text('"one" and "two"', {}) == "one"
    assert wanted_text('"one"', {"text": " "}) == "one"
    assert wanted_text('"one"', {"text": "two"}) == "two"
