"""HPSv3 (arXiv 2508.03789): a vision-language model that gives mean and spread of a preference.

Its package pins versions of its own, so it lives in an image of its own and is reached as a
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

PACKAGE = "hpsv3"


class HpsV3:
    """mu of the model's (mu, sigma); about 9.7 for pictures of SD3.5-M.

    The package's processor brings every picture to 256 * 28 * 28 pixels. ``checkpoint`` is a
    ``.safetensors`` file; without it the package fetches MizzenAI/HPSv3.
    """

    def __init__(self, place: Place, checkpoint: str = "", batch_size: int = 8) -> None:
        """Load the model onto the place's device.

        Raises:
            RewardFailed: the package is not installed here, or the checkpoint may run code.
        """
        if checkpoint and not checkpoint.endswith(".safetensors"):
            raise RewardFailed(
                f"checkpoint: got {checkpoint!r}, expected a .safetensors file: other files are "
                "read by unpickling, which runs what is in them"
            )
        try:
            from hpsv3 import HPSv3RewardInferencer
        except ImportError as error:
            raise RewardFailed(
                f"the package {PACKAGE!r} cannot be imported here ({error}): install it into an "
                "image of its own, serve the reward there, and name the address in 'service'"
            ) from error
        self.batch_size = batch_size
        self._model: Any = HPSv3RewardInferencer(
            checkpoint_path=checkpoint or None, device=str(place.device)
        )

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        del metadata
        pictures = [picture_of(image) for image in images_N3HW]
        # By name: releases of the package differ in the order.
        logits_N2 = self._model.reward(prompts=list(prompts), image_paths=pictures)
        mu_N: Tensor = torch.as_tensor(logits_N2)[:, 0]
        return mu_N.detach().float().cpu()
