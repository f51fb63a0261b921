"""How much people like a picture, whatever it shows: the LAION aesthetic predictor."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tempflow_trainer.rewards import pretrained
from tempflow_trainer.rewards.base import Place
from tempflow_trainer.rewards.clip import CLIP_L, Clip, pictures

HEAD = "trl-lib/ddpo-aesthetic-predictor"
HEAD_FILE = "aesthetic-model.pth"
WIDTHS = (1024, 128, 64, 16, 1)


class Head(nn.Module):
    """Five linear layers without anything between them but dropout, which is off: as published
    (sac+logos+ava1-l14-linearMSE)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inputs = (width, *WIDTHS[:-1])
        linear = [nn.Linear(i, o) for i, o in zip(inputs, WIDTHS, strict=True)]
        # The places of the dropouts keep the names of the published weights.
        self.layers = nn.Sequential(
            linear[0],
            nn.Identity(),
            linear[1],
            nn.Identity(),
            linear[2],
            nn.Identity(),
            *linear[3:],
        )

    def forward(self, features_ND: Tensor) -> Tensor:
        """[N]."""
        scores_N1: Tensor = self.layers(features_ND)
        return scores_N1[:, 0]


class Aesthetic:
    """The head on CLIP-L image features of length 1; about 5 to 6.5. The prompt has no part."""

    def __init__(
        self,
        model: str = CLIP_L,
        head: str = HEAD,
        head_file: str = HEAD_FILE,
        revision: str = "",
        head_revision: str = "",
        batch_size: int = 32,
        *,
        place: Place,
    ) -> None:
        self.batch_size = batch_size
        self.clip = Clip.load(model, model, revision, place)
        self.head = Head(self.clip.model.config.projection_dim)
        tensors = pretrained.weights(head, head_file, head_revision, place)
        pretrained.assign(self.head, tensors, f"{head_file} of {head}")
        self.head.eval().requires_grad_(False).to(place.device)

    @torch.no_grad()
    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        features_ND = self.clip.image_features(self.clip.pixels(pictures(images_N3HW)))
        scores_N: Tensor = self.head(features_ND)
        return scores_N.cpu()
