"""What families with a pipeline of diffusers share: how it is opened, what of it is trained."""

from typing import Any, ClassVar, Self

import torch
from torch import nn

from tempflow_trainer.models.base import FlowModel
from tempflow_trainer.models.source import open_pipeline


class PipelineModel(FlowModel):
    """The parts of a pipeline; nothing of it but the transformer is trained."""

    pipeline_class: ClassVar[Any]
    """diffusers' own."""

    def __init__(self, pipeline: Any, *, max_text_tokens: int) -> None:
        """Use the parts of ``pipeline``, of class ``pipeline_class``."""
        self.pipeline = pipeline
        # Dropout would make the ratio of the first update differ from 1.
        self.transformer = pipeline.transformer.eval()
        self._max_text_tokens = max_text_tokens
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and part is not self.transformer:
                part.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        source: str,
        *,
        revision: str | None,
        dtype: torch.dtype,
        device: torch.device,
        max_text_tokens: int,
    ) -> Self:
        """From a folder or a hub id.

        Raises:
            ModelUnavailable: files missing, no access, no network, or another kind of model.
        """
        pipeline = open_pipeline(cls.pipeline_class, source, revision=revision, dtype=dtype)
        return cls(pipeline.to(device), max_text_tokens=max_text_tokens)
