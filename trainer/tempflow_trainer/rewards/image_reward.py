"""ImageReward (arXiv 2304.05977): BLIP with a head trained on people's rankings.

Its package wants old releases of others, so it lives in an image of its own and is reached as a
service (docs/rewards-service.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tempflow_api.errors import RewardFailed
from tempflow_trainer.rewards.base import Place
from tempflow_trainer.rewards.wire import picture_of

PACKAGE = "image-reward"
MODEL = "ImageReward-v1.0"


class ImageReward:
    """The head's output, normalised by the package as (r - 0.1672) / 1.0333: about -2 to 2.

    The package scales pictures to 224 pixels and reads 35 tokens of a prompt. ``model`` is one of
    its names, which it fetches, or a file.
    """

    def __init__(self, place: Place, model: str = MODEL, batch_size: int = 32) -> None:
        """Load the model onto the place's device.

        Raises:
            RewardFailed: the package is not installed here.
        """
        try:
            import ImageReward as package  # noqa: N813 (a module)
        except ImportError as error:
            raise RewardFailed(
                f"the package {PACKAGE!r} cannot be imported here ({error}): install it into an "
                "image of its own together with OpenAI's clip (openai-clip), which it imports "
                "without asking for it, serve the reward there, and name the address in 'service'"
            ) from error
        self.batch_size = batch_size
        self._model: Any = package.load(
            model, device=str(place.device), download_root=str(place.cache / "image-reward")
        )

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
