"""What a picture and a score are on their way, and what is refused as neither."""

import io
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from tempflow_trainer.rewards import wire

PIXELS = 10_000


@pytest.mark.parametrize("image_format", ["png", "webp"])
@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_picture_arrives_as_it_was(
    image_format: wire.ImageFormat, height: int, width: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)
    content = wire.encode_image(image, image_format)
    assert torch.equal(wire.decode_image(content, max_pixels=PIXELS), image)
    as_floats = wire.encode_image(image.float() / 255, image_format)
    assert torch.equal(wire.decode_image(as_floats, max_pixels=PIXELS), image)


def png(mode: str, size: tuple[int, int] = (4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, format="PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A small PNG that says it is, and unpacks to, a picture of ``side`` x ``side``."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1 << 16), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed)


def animated() -> bytes:
    file = io.BytesIO()
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(file, format="WEBP", save_all=True, append_images=[second], lossless=True)
    return file.getvalue()


def gif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole PNG or WebP file"),
        (b"\x80\x04\x95.", "not a whole PNG or WebP file"),
        (gif(), "not a whole PNG or WebP file"),
        (wire.encode_image(torch.zeros(3, 60, 60))[:-30], "not a whole PNG or WebP file"),
        (png("L"), "the picture's mode is L, expected 8-bit RGB"),
        (png("RGBA"), "the picture's mode is RGBA"),
        (png("RGB", (101, 100)), "101 x 100 pixels, at most 10000"),
        (bomb(2_000), "2000 x 2000 pixels, at most 10000"),
        (bomb(1_000_000), "the picture is too large, at most 10000 pixels"),
        (animated(), "the picture is animated"),
    ],
    ids=["empty", "pickle", "gif", "cut", "grey", "alpha", "large", "bomb", "huge bomb", "frames"],
)
def test_what_is_no_picture_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wire.decode_image(content, max_pixels=PIXELS)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", '"1"x', "1e999"])
def test_a_number_that_is_not_finite_is_no_score(number: str) -> None:
    text = '{"version": 1, "scores": [{"id": "a", "score": %s}]}'
    assert wire.ScoreReply.model_validate_json(text % "0.5").scores[0].score == 0.5
    with pytest.raises(ValidationError):
        wire.ScoreReply.model_validate_json(text % number)


def test_another_version_is_refused_and_a_further_key_is_not() -> None:
    item = {"id": "a", "prompt": "p", "colour": "red"}
    assert wire.ScoreRequest.model_validate({"items": [item]}).items[0].prompt == "p"
    with pytest.raises(ValidationError, match="version"):
        wire.ScoreRequest.model_validate({"version": 2, "items": [item]})


def test_ids_of_two_calls_differ() -> None:
    one, other = (wire.request_of(["a", "b"], [{}, {"n": 1}], call=name) for name in ("x", "y"))
    assert len({item.id for request in (one, other) for item in request.items}) == 4
    assert one.items[1].metadata == {"n": 1}
