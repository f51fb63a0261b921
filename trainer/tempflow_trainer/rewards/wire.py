"""What a reward service and its clients say to one another.

A request is ``multipart/form-data`` (RFC 7578) to ``POST /v1/score``: first a part ``request`` with
JSON, then one part ``image`` an item, in the order of the items, as PNG or as lossless WebP. The
reply is JSON and repeats the ids in that order. Every other reply has a status of 400 or more and
``{"error": "..."}``. Nothing on the wire can run code, and no picture is altered on its way: it is
what the 8-bit file of it shows.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from torch import Tensor

from tempflow_trainer.rewards.base import as_bytes

SCORE_PATH = "/v1/score"
REWARD_PATH = "/v1/reward"
HEALTH_PATH = "/health"
METRICS_PATH = "/metrics"

ImageFormat = Literal["png", "webp"]
CONTENT_TYPES: dict[str, str] = {"png": "image/png", "webp": "image/webp"}
# zlib's fastest level: the usual one saves 7 % of the bytes and takes 1.3 times as long.
PNG_COMPRESSION = 1


class Message(BaseModel):
    """JSON on the wire, with keys in camelCase; unknown keys belong to a later version."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", allow_inf_nan=False
    )

    def json_bytes(self) -> bytes:
        return self.model_dump_json(by_alias=True).encode()


class Item(Message):
    """One image to score; the picture itself is a part of its own."""

    id: Annotated[str, Field(min_length=1, max_length=64)]
    prompt: Annotated[str, Field(max_length=100_000)]
    metadata: dict[str, Any] = {}


class ScoreRequest(Message):
    version: Literal[1] = 1
    items: Annotated[list[Item], Field(min_length=1)]


class ItemScore(Message):
    """A score, or the reason why there is none."""

    id: str
    score: float | None = None
    error: str | None = None


class ScoreReply(Message):
    version: Literal[1] = 1
    scores: list[ItemScore]


class Description(Message):
    """What a service scores, at ``GET /v1/reward``."""

    version: Literal[1] = 1
    reward: str
    batch_size: Annotated[int, Field(ge=1)]
    """Most images that are scored in one call; of a group-wise reward the largest group."""
    group_wise: bool = False
    """Whether a request is one group of images that are compared."""
    max_images: Annotated[int, Field(ge=1)]
    """Most images in one request."""
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    """Most bytes in one request, where the server says so."""


class Failure(Message):
    """The body of every reply that is not a success."""

    error: str


def request_of(
    prompts: Sequence[str], metadata: Sequence[Mapping[str, object]], *, call: str
) -> ScoreRequest:
    """Items for N images; ids are their positions after the name of the call, so that an answer
    to another call is no answer to this one."""
    return ScoreRequest(
        items=[
            Item(id=f"{call}-{i}", prompt=prompt, metadata=dict(extra))
            for i, (prompt, extra) in enumerate(zip(prompts, metadata, strict=True))
        ]
    )


PART_BYTES = 1024
"""More than what stands around a picture in a request."""


def requests_within(sizes: Sequence[int], most_bytes: int) -> list[slice]:
    """Runs of pictures of ``sizes`` bytes that each fit into one request; one that fits into none
    is alone, and refused by who reads it."""
    found: list[slice] = []
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size + PART_BYTES > most_bytes:
            found.append(slice(start, index))
            start, total = index, 0
        total += size + PART_BYTES
    return [*found, slice(start, len(sizes))]


def encode_image(image_3HW: Tensor, image_format: ImageFormat = "png") -> bytes:
    """An image, float in [0, 1] or uint8, as a file without loss beyond rounding to 8 bits."""
    picture = picture_of(image_3HW)
    file = io.BytesIO()
    if image_format == "png":
        picture.save(file, format="PNG", compress_level=PNG_COMPRESSION)
    else:
        picture.save(file, format="WEBP", lossless=True, quality=0, method=0, exact=True)
    return file.getvalue()


def picture_of(image_3HW: Tensor) -> Image.Image:
    """An image, float in [0, 1] or uint8, as Pillow has it."""
    pixels_3HW = as_bytes(image_3HW) if image_3HW.is_floating_point() else image_3HW
    return Image.fromarray(pixels_3HW.permute(1, 2, 0).contiguous().cpu().numpy())


def decode_image(content: bytes, *, max_pixels: int) -> Tensor:
    """The picture in a file, uint8 [3, H, W].

    Nothing is unpacked before its size is known from the header, so a small file cannot become a
    large picture.

    Raises:
        ValueError: not a PNG or WebP file, damaged, not 8-bit RGB, animated, or too large.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of pictures beyond its own bound; ours is the one that counts.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=("PNG", "WEBP"))
            _check_header(picture, max_pixels)
            picture.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"the picture is too large, at most {max_pixels} pixels") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"not a whole PNG or WebP file: {error}") from error
    width, height = picture.size
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(height, width, 3).permute(2, 0, 1).contiguous()


def _check_header(picture: Image.Image, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(f"the picture has {width} x {height} pixels, at most {max_pixels}")
    if picture.mode != "RGB":
        raise ValueError(f"the picture's mode is {picture.mode}, expected 8-bit RGB")
    if getattr(picture, "n_frames", 1) != 1:
        raise ValueError("the picture is animated, expected a single one")
