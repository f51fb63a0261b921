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
from tempflow_trainer.rewards import pretrained
from tempflow_trainer.rewards.base import Place, Scores
from tempflow_trainer.rewards.wire import picture_of

PACKAGE = "hpsv3"
BASE, WEIGHTS = "Qwen/Qwen2-VL-7B-Instruct", "MizzenAI/HPSv3"
"""What the package fetches from the hub, into HF_HOME."""


class HpsV3:
    """mu of the model's (mu, sigma); about 9.7 for pictures of SD3.5-M.

    The package brings every picture to about 256 * 28 * 28 pixels of its own shape, and cuts no
    prompt. It loads BASE, whose weights it then replaces by those of ``checkpoint``, a
    ``.safetensors`` file; without one, of WEIGHTS.
    """

    def __init__(self, place: Place, checkpoint: str = "", batch_size: int = 8) -> None:
        """Load the model onto the place's device.

        Raises:
            RewardFailed: the package is not installed here, or the checkpoint may run code.
            ModelUnavailable: files are missing, out of reach, or another model's.
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
        with pretrained.foreign(PACKAGE, f"{BASE} and {checkpoint or WEIGHTS}"):
            self._model: Any = HPSv3RewardInferencer(
                checkpoint_path=checkpoint or None, device=str(place.device)
            )
        if place.device.type == "cpu":
            # The package's mixture of bfloat16 and float32 computes by CUDA's autocast only.
            self._model.model.float()
        self._marks: list[str] = list(self._model.processor.tokenizer.get_added_vocab())

    @torch.no_grad()
    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Scores:
        del metadata
        pictures = [picture_of(image) for image in images_N3HW]
        failed = {i: reason for i, p in enumerate(prompts) if (reason := self._refusal(p))}
        texts = ["" if i in failed else prompt for i, prompt in enumerate(prompts)]
        # By name: releases of the package differ in the order.
        logits_N2 = self._model.reward(prompts=texts, image_paths=pictures)
        mu_N: Tensor = torch.as_tensor(logits_N2)[:, 0]
        return Scores(mu_N.float().cpu(), failed)

    def _refusal(self, prompt: str) -> str:
        """Where a mark of the model's own stands in a prompt, the package gives wrong scores to the
        whole batch: it takes every <|Reward|> for an answer's place."""
        found = [mark for mark in self._marks if mark in prompt]
        return f"the prompt has {found[0]}, which is a mark of the model's own" if found else ""
