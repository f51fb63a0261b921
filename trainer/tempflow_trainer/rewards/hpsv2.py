"""Human preference score, version 2 (Wu et al., arXiv 2306.09341).

The weights are published in the layout of open_clip. They are renamed into the CLIP of
transformers, which is here anyway: open_clip would bring torchvision and timm.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from tempflow_api.errors import ModelUnavailable
from tempflow_trainer.rewards import pretrained
from tempflow_trainer.rewards.base import Place
from tempflow_trainer.rewards.clip import CLIP_H, Clip, pictures

WEIGHTS = "xswu/HPSv2"
WEIGHTS_FILE = "HPS_v2.1_compressed.pt"

_WHOLE = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)$")


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and shapes as those of ``transformers.CLIPModel``.

    Raises:
        ModelUnavailable: a tensor of which no CLIP of open_clip knows.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        block = _BLOCK.match(name)
        if name in _WHOLE:
            found[_WHOLE[name]] = value
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = value.T
        elif block and block[3] == "attn.in_proj":
            prefix = f"{_tower(block)}.self_attn"
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                found[f"{prefix}.{part}.{block[4]}"] = rows
        elif block and block[3] in _IN_BLOCK:
            found[f"{_tower(block)}.{_IN_BLOCK[block[3]]}.{block[4]}"] = value
        elif name != "attn_mask":  # a constant that some versions store
            raise ModelUnavailable(f"{name} is no tensor of a CLIP in the layout of open_clip")
    return {name: value.float().contiguous() for name, value in found.items()}


def _tower(block: re.Match[str]) -> str:
    return f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"


def fit_and_pad(picture: Image.Image, size: int) -> Image.Image:
    """The longer side scaled to ``size``, and the rest filled up with black on both sides: the
    whole picture is judged, not its centre."""
    width, height = picture.size
    scale = size / max(width, height)
    if scale == 1 and width == height:
        return picture
    fitted = (round(width * scale), round(height * scale))
    padded = Image.new("RGB", (size, size))
    offset = ((size - fitted[0]) // 2, (size - fitted[1]) // 2)
    padded.paste(picture.resize(fitted, Image.Resampling.BICUBIC), offset)
    return padded


class HpsV2:
    """Cosine of image and prompt by a tuned CLIP-H, without its scale; 0.2 to 0.4. Scores of
    versions 2 and 2.1 are not comparable."""

    def __init__(
        self,
        weights: str = WEIGHTS,
        weights_file: str = WEIGHTS_FILE,
        model: str = CLIP_H,
        weights_revision: str = "",
        revision: str = "",
        batch_size: int = 32,
        *,
        place: Place,
    ) -> None:
        """``model`` gives the architecture and the processors; all weights are ``weights``'."""
        from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.batch_size = batch_size
        config = pretrained.load(CLIPConfig, model, revision, place)
        # On no device: two gigabytes of random numbers need not be drawn to be replaced.
        with torch.device("meta"):
            clip = CLIPModel(config)
        tensors = from_open_clip(pretrained.weights(weights, weights_file, weights_revision, place))
        clip = clip.to_empty(device="cpu")
        for name, buffer in clip.named_buffers():  # positions, which are not stored
            if not name.endswith("position_ids"):
                raise ModelUnavailable(f"{model} has a buffer {name}, which no CLIP has")
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
        pretrained.assign(clip, tensors, f"{weights_file} of {weights}")
        self.clip = Clip(
            clip.to(place.device).eval(),
            pretrained.load(CLIPTokenizer, model, revision, place),
            pretrained.load(CLIPImageProcessorPil, model, revision, place),
            place.device,
        )

    def pixels(self, images_N3HW: Tensor) -> Tensor:
        """What the network sees: the whole of each image, normalised."""
        size = self.clip.model.config.vision_config.image_size
        return self.clip.pixels([fit_and_pad(one, size) for one in pictures(images_N3HW)])

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        seen = self.clip.image_features(self.pixels(images_N3HW))
        return (seen * self.clip.text_features(prompts)).sum(dim=1).cpu()
