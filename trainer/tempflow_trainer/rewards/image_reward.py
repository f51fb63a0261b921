"""ImageReward (arXiv 2304.05977): BLIP with a head trained on people's rankings.

Its package wants old releases of others, so it lives in an image of its own and is reached as a
service (docs/rewards-service.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempflow_api.errors import ModelUnavailable, RewardFailed
from tempflow_trainer.rewards import pretrained
from tempflow_trainer.rewards.base import Place
from tempflow_trainer.rewards.wire import picture_of

PACKAGE = "image-reward"
MODEL, TOKENIZER = "ImageReward-v1.0", "bert-base-uncased"


class ImageReward:
    """The head's output, normalised by the package as (r - 0.1672) / 1.0333: about -2 to 2.

    The package scales a picture's shorter side to 224 pixels, of the longer one it takes the
    middle, and it reads 35 tokens of a prompt. ``model`` is one of its names, which it fetches
    from THUDM/ImageReward, or a file with its ``med_config.json`` beside it.
    """

    def __init__(self, place: Place, model: str = MODEL, batch_size: int = 32) -> None:
        """Load the model onto the place's device.

        Raises:
            RewardFailed: the package is not installed here, or a file lies there alone.
            ModelUnavailable: files are missing, out of reach, or another model's.
        """
        config = Path(model).with_name("med_config.json") if Path(model).is_file() else None
        if config and not config.is_file():
            raise RewardFailed(f"model: beside {model} there is no {config.name}, its text encoder")
        try:
            import ImageReward as package  # noqa: N813 (a module)
        except ImportError as error:
            raise RewardFailed(
                f"the package {PACKAGE!r} cannot be imported here ({error}): install it into an "
                "image of its own together with OpenAI's clip (openai-clip), which it imports "
                "without asking for it, serve the reward there, and name the address in 'service'"
            ) from error
        self.batch_size = batch_size
        with pretrained.foreign(PACKAGE, f"{model} and {TOKENIZER}"):
            self._model: Any = package.load(
                model,
                device=str(place.device),
                download_root=str(place.cache / "image-reward"),
                med_config=str(config) if config else None,
            )
            if config:
                self._check_whole(model)

    def _check_whole(self, file: str) -> None:
        """The package leaves at random what a file lacks, without a word."""
        held = torch.load(file, map_location="meta", weights_only=True)
        used = ("mlp.", "blip.visual_encoder.", "blip.text_encoder.")
        names = [name for name, _ in self._model.named_parameters() if name.startswith(used)]
        if lacking := [name for name in names if name not in held]:
            raise ModelUnavailable(f"{file} lacks {len(lacking)} weights, as {lacking[0]}")

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        del metadata
        with torch.no_grad():
            return torch.tensor(
                [
                    float(self._model.score(prompt, picture_of(image)))
                    for prompt, image in zip(prompts, images_N3HW, strict=True)
                ]
            )
