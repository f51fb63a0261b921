"""Which objects a picture shows, where, and in which colour.

Objects are found by a Mask2Former that was trained on the 80 classes of COCO, colours by a
zero-shot CLIP on the object alone, as GenEval does it (Ghosh et al., arXiv 2310.11513).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tempflow_trainer.rewards import pretrained
from tempflow_trainer.rewards.base import Place
from tempflow_trainer.rewards.clip import Clip

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
)  # fmt: skip
TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
GROUND = "#999"
"""What an object is put on before its colour is judged."""

# GenEval's names of classes that label files call otherwise.
ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


@dataclass(frozen=True)
class Found:
    """One object in a picture."""

    score: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, in pixels; right and bottom lie outside."""
    mask_HW: Tensor
    """Which pixels are the object's, bool."""


@dataclass(frozen=True)
class Detector:
    """An instance segmentation model of transformers with its processor; untyped, as they are."""

    model: Any
    processor: Any
    device: torch.device

    @classmethod
    def load(cls, model: str, revision: str, place: Place) -> "Detector":
        """Raises ModelUnavailable: files missing or out of reach."""
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

        network = pretrained.load(Mask2FormerForUniversalSegmentation, model, revision, place)
        return cls(
            network.to(place.device).eval(),
            pretrained.load(Mask2FormerImageProcessorPil, model, revision, place),
            place.device,
        )

    @property
    def classes(self) -> frozenset[str]:
        """What it can find, by GenEval's names."""
        return frozenset(map(_name, self.model.config.id2label.values()))

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the network sees of the pictures."""
        found = self.processor(images=list(images), return_tensors="pt")
        return {name: found[name] for name in ("pixel_values", "pixel_mask")}

    @torch.no_grad()
    def find(self, images: Sequence[Image.Image], threshold: float) -> list[dict[str, list[Found]]]:
        """The objects of each picture with a higher score, by class, the surest first."""
        inputs = {name: tensor.to(self.device) for name, tensor in self.pixels(images).items()}
        seen = self.model(**inputs)
        # What follows draws its maps on the CPU, and fails on masks from elsewhere.
        for name in ("class_queries_logits", "masks_queries_logits"):
            seen[name] = seen[name].cpu()
        results = self.processor.post_process_instance_segmentation(
            seen,
            threshold=threshold,
            target_sizes=[(image.height, image.width) for image in images],
            return_binary_maps=True,
        )
        return [self._by_class(result, threshold) for result in results]

    def _by_class(self, result: Mapping[str, Any], threshold: float) -> dict[str, list[Found]]:
        found: dict[str, list[Found]] = {}
        for segment in result["segments_info"]:
            if segment["score"] > threshold:
                mask_HW = result["segmentation"][segment["id"]].bool()
                name = _name(self.model.config.id2label[segment["label_id"]])
                one = Found(segment["score"], box_of(mask_HW), mask_HW)
                found.setdefault(name, []).append(one)
        return {
            name: sorted(objects, key=lambda one: -one.score) for name, objects in found.items()
        }


@dataclass(frozen=True)
class ColourReader:
    """Tells the colour of an object by a zero-shot CLIP."""

    clip: Clip
    classifiers: dict[str, Tensor] = field(default_factory=dict)
    """A direction a colour, [D, 10], by class."""

    @classmethod
    def load(cls, model: str, revision: str, place: Place) -> "ColourReader":
        """Raises ModelUnavailable: files missing or out of reach."""
        return cls(Clip.load(model, model, revision, place))

    def colours(self, image: Image.Image, objects: Sequence[Found], name: str) -> list[str]:
        """The likeliest colour of each object."""
        crops = [cut_out(image, one) for one in objects]
        features_ND = self.clip.image_features(self.clip.pixels(crops))
        nearest = (features_ND @ self._classifier(name)).argmax(dim=1)
        return [COLOURS[index] for index in nearest.tolist()]

    def _classifier(self, name: str) -> Tensor:
        if name not in self.classifiers:
            means = []
            for colour in COLOURS:
                texts = [template.format(colour=colour, name=name) for template in TEMPLATES]
                mean_D = self.clip.text_features(texts).mean(dim=0)
                means.append(mean_D / mean_D.norm())
            self.classifiers[name] = torch.stack(means, dim=1)
        return self.classifiers[name]


def box_of(mask_HW: Tensor) -> tuple[float, float, float, float]:
    """The smallest box with all pixels of the mask."""
    rows, columns = mask_HW.any(dim=1).nonzero(), mask_HW.any(dim=0).nonzero()
    left, right = float(columns.min()), float(columns.max()) + 1
    return left, float(rows.min()), right, float(rows.max()) + 1


def cut_out(image: Image.Image, found: Found) -> Image.Image:
    """The object's box, with what is not the object in grey."""
    ground = Image.new("RGB", image.size, GROUND)
    mask = Image.fromarray(found.mask_HW.byte().mul(255).numpy())
    left, top, right, bottom = map(int, found.box)
    return Image.composite(image, ground, mask).crop((left, top, right, bottom))


def _name(label: str) -> str:
    return ALIASES.get(label, label)
