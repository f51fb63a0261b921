"""CLIP, and the rewards that are its similarity of image and prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tempflow_trainer.rewards import pretrained
from tempflow_trainer.rewards.base import Place, as_bytes

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"


def pictures(images_N3HW: Tensor) -> list[Image.Image]:
    """Images in [0, 1] as pictures of 8 bits a channel, which the processors are made for."""
    pixels = as_bytes(images_N3HW).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(image) for image in pixels]


@dataclass(frozen=True)
class Clip:
    """A CLIP of transformers with its own processors; untyped, as they are."""

    model: Any
    tokenizer: Any
    processor: Any
    device: torch.device

    @classmethod
    def load(cls, model: str, processor: str, revision: str, place: Place) -> "Clip":
        """Model and processors; ``revision`` is that of the model.

        Raises:
            ModelUnavailable: files missing or out of reach.
        """
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        of_processor = revision if processor == model else ""
        return cls(
            pretrained.load(CLIPModel, model, revision, place).to(place.device).eval(),
            pretrained.load(CLIPTokenizer, processor, of_processor, place),
            pretrained.load(CLIPImageProcessorPil, processor, of_processor, place),
            place.device,
        )

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """What the network sees of the pictures: resized, cropped, normalised."""
        pixels: Tensor = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the network reads of the texts; longer ones are cut to its context."""
        longest = self.model.config.text_config.max_position_embeddings
        found = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def image_features(self, pixels_N3HW: Tensor) -> Tensor:
        """Of length 1, [N, D]."""
        pooled = self.model.vision_model(pixel_values=pixels_N3HW.to(self.device)).pooler_output
        return _unit(self.model.visual_projection(pooled))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Of length 1, [N, D]. The draws of a group share their prompt: each is read once."""
        distinct = list(dict.fromkeys(texts))
        tokens = {name: t.to(self.device) for name, t in self.tokens(distinct).items()}
        features = _unit(self.model.text_projection(self.model.text_model(**tokens).pooler_output))
        return features[[distinct.index(text) for text in texts]]

    def cosines(self, images_N3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Between each image in [0, 1] and its prompt, [N] on the CPU."""
        seen = self.image_features(self.pixels(pictures(images_N3HW)))
        return (seen * self.text_features(prompts)).sum(dim=1).cpu()

    @property
    def scale(self) -> float:
        """The factor that the model was trained to put on its cosines; about 100."""
        return float(self.model.logit_scale.detach().exp())


class PickScore:
    """exp(logit_scale) cos(image, prompt) of a CLIP-H that was tuned on human choices; 20 to 24
    (Kirstain et al., arXiv 2305.01569). Published training code takes 26 as the divisor."""

    def __init__(
        self,
        model: str = PICKSCORE,
        processor: str = CLIP_H,
        revision: str = "",
        divisor: float = 1.0,
        batch_size: int = 32,
        *,
        place: Place,
    ) -> None:
        self.batch_size, self.divisor = batch_size, divisor
        self.clip = Clip.load(model, processor, revision, place)

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        return self.clip.scale * self.clip.cosines(images_N3HW, prompts) / self.divisor


class ClipScore:
    """exp(logit_scale) cos(image, prompt) / 100 of a plain CLIP; about 0.28."""

    def __init__(
        self, model: str = CLIP_L, revision: str = "", batch_size: int = 32, *, place: Place
    ) -> None:
        self.batch_size = batch_size
        self.clip = Clip.load(model, model, revision, place)

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        return self.clip.scale * self.clip.cosines(images_N3HW, prompts) / 100


def _unit(features_ND: Tensor) -> Tensor:
    length_N1: Tensor = features_ND.norm(dim=1, keepdim=True)
    return features_ND / length_N1
