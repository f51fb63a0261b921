"""The families of models, by name: a new one is one file and one line here."""

import importlib
from pathlib import Path

import diffusers
import torch
import transformers

from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import Model
from tempflow_trainer.models.base import FlowModel
from tempflow_trainer.models.source import locate

# Import paths and not classes: a family's pipeline takes seconds to import.
FAMILIES = {
    "digits": "tempflow_trainer.models.digits:Digits",
    "sd3": "tempflow_trainer.models.sd3:Sd3",
    "flux": "tempflow_trainer.models.flux:Flux",
    "qwen-image": "tempflow_trainer.models.qwen_image:QwenImage",
    "flux2-klein": "tempflow_trainer.models.flux2_klein:Flux2Klein",
}


def load(model: Model, *, cache: Path, device: torch.device) -> FlowModel:
    """The model of a job, on its device.

    Raises:
        ModelUnavailable: a family that this version has no adapter for, or files that cannot be
            loaded.
    """
    if model.family not in FAMILIES:
        raise ModelUnavailable(
            f"spec.model.family: {model.family} has no adapter in this version; it has "
            + ", ".join(FAMILIES)
        )
    _no_progress_bars()
    module, _, name = FAMILIES[model.family].partition(":")
    family: FlowModel = getattr(importlib.import_module(module), name).load(
        locate(model.source, cache),
        revision=model.revision,
        dtype=getattr(torch, model.precision),
        device=device,
        max_text_tokens=model.max_text_tokens,
    )
    return family


def _no_progress_bars() -> None:
    """Bars of the libraries fill a log with fragments; phases and errors are told by the run."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
