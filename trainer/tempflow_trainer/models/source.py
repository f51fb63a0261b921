"""Where a model's files are: a folder, an object store, or the Hugging Face hub."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import fsspec
import torch
from botocore.exceptions import BotoCoreError

from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import Model
from tempflow_trainer.models.download import fetch

BUILTIN = "builtin:"


def locate(model: Model, cache: Path) -> str:
    """A local folder with the model's files, or the hub id to ask diffusers for.

    ``s3://`` prefixes are copied below ``cache`` first; a copy that is already there is used.

    Raises:
        ModelUnavailable: a folder or prefix that does not exist or is empty.
    """
    source = model.source
    if source.startswith(BUILTIN):
        return str(files("tempflow_trainer") / "assets" / source.removeprefix(BUILTIN))
    if source.startswith("s3://"):
        return str(_fetch(source, cache))
    path = Path(source.removeprefix("file://"))
    if path.is_dir():
        return str(path)
    looks_like_path = source.startswith(("file://", "/", ".")) or source.count("/") != 1
    if looks_like_path:
        raise ModelUnavailable(
            f"spec.model.source: no folder {str(path)!r}; expected a folder in the diffusers "
            "layout, builtin:digits, s3://bucket/prefix or a Hugging Face id (owner/name)"
        )
    return source


def open_pipeline(kind: Any, source: str, *, revision: str | None, dtype: torch.dtype) -> Any:
    """The diffusers pipeline of class ``kind``, which is untyped, at a folder or hub id.

    Raises:
        ModelUnavailable: files missing, no access, no network, or another kind of model.
    """
    refused = f"spec.model.source: {source} cannot be loaded as {kind.__name__}: "
    try:
        found = kind.load_config(source, revision=revision).get("_class_name")
        if found != kind.__name__:
            raise ModelUnavailable(f"{refused}it is a {found}; see spec.model.family")
        return kind.from_pretrained(source, revision=revision, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{refused}{error}") from error


def _fetch(source: str, cache: Path) -> Path:
    try:
        filesystem, prefix = fsspec.url_to_fs(source, use_listings_cache=False)
        return fetch(filesystem, source, prefix, cache)
    except (OSError, BotoCoreError) as error:
        raise ModelUnavailable(f"spec.model.source: {source} cannot be read: {error}") from error
