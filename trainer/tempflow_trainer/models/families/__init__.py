"""The families of models, one module each, named as the family in a job."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import Model
from tempflow_trainer.models.base import FlowModel
from tempflow_trainer.models.source import locate


def adapter_of(family: str) -> Any:
    """The subclass of ``FlowModel`` that the family's module defines.

    Imported when it is needed: a pipeline takes seconds.

    Raises:
        ModelUnavailable: this version has no such module.
    """
    path = f"{__name__}.{family.replace('-', '_')}"
    if importlib.util.find_spec(path) is None:
        raise ModelUnavailable(f"spec.model.family: this version has no adapter for {family}")
    defined = [
        kind
        for kind in vars(importlib.import_module(path)).values()
        if isinstance(kind, type) and issubclass(kind, FlowModel) and kind.__module__ == path
    ]
    [adapter] = defined
    return adapter


def load(model: Model, *, cache: Path, device: torch.device) -> FlowModel:
    """The model of a job, on its device.

    Raises:
        ModelUnavailable: a family that this version has no adapter for, or files that cannot be
            loaded.
    """
    adapter = adapter_of(model.family)
    _no_progress_bars()
    loaded: FlowModel = adapter.load(
        locate(model.source, cache),
        revision=model.revision,
        dtype=getattr(torch, model.precision),
        device=device,
        max_text_tokens=model.max_text_tokens,
    )
    return loaded


def _no_progress_bars() -> None:
    """Bars of the libraries fill a log with fragments; phases and errors are told by the run."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
