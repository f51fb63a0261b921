"""Whether a picture shows the text that its prompt asks for.

The engine is RapidOCR: PP-OCR, detection and recognition, with its models inside the package, so
that nothing is fetched.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tempflow_trainer.rewards.base import Scores
from tempflow_trainer.rewards.clip import pictures

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


def wanted_text(prompt: str, metadata: Mapping[str, object]) -> str:
    """The text to show: ``text`` of the metadata, else the first that the prompt has in double
    quotes.

    Raises:
        ValueError: there is none.
    """
    given = metadata.get("text")
    if isinstance(given, str) and given.strip():
        return given
    found = QUOTED.search(prompt)
    if found is None:
        raise ValueError(
            f'no text to look for in prompt {prompt!r}: expected it in double quotes, or as "text" '
            "in the prompt's line of a .jsonl file"
        )
    return found[1] or found[2]


def similarity(read: str, wanted: str) -> float:
    """1 - min(distance, length) / length, in [0, 1], without regard to case and blanks.

    The distance is Levenshtein's, and 0 where the wanted text is a part of what was read.
    """
    from rapidfuzz.distance import Levenshtein

    read, wanted = ("".join(text.lower().split()) for text in (read, wanted))
    if wanted in read:
        return 1.0
    distance = int(Levenshtein.distance(read, wanted))
    return 1 - min(distance, len(wanted)) / len(wanted)


def engine() -> Callable[[Tensor], str]:
    """Reads the text in a picture, [3, H, W] in [0, 1], in the order of its lines."""
    from rapidocr import RapidOCR

    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    reader = RapidOCR(
        params={
            "Global.log_level": "error",
            # As many as the rank has: by default it takes every core for itself.
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
        }
    )

    def read(image_3HW: Tensor) -> str:
        (picture,) = pictures(image_3HW[None])
        return " ".join(reader(picture).txts or ())

    return read


class Ocr:
    """``similarity`` of the text in the picture to the text that is asked for, in [0, 1]."""

    def __init__(self, batch_size: int = 16) -> None:
        self.batch_size = batch_size
        self.read = engine()

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Scores:
        values = torch.full((len(prompts),), torch.nan)
        failed = {}
        for index, (prompt, facts) in enumerate(zip(prompts, metadata, strict=True)):
            wanted = wanted_text(prompt, facts)
            try:
                values[index] = similarity(self.read(images_N3HW[index]), wanted)
            except RuntimeError as error:  # of the engine, about this picture
                failed[index] = f"the text of a picture cannot be read: {error}"
        return Scores(values, failed)
