"""The files of a scorer's model: a folder, an object store, or the Hugging Face hub.

Weights are read from safetensors, or from a torch file without running what is pickled in it.
"""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its client
from safetensors import SafetensorError
from torch import Tensor

from tempflow_api.errors import ModelUnavailable
from tempflow_trainer.models import source as models
from tempflow_trainer.rewards.base import Place


def load(kind: Any, source: str, revision: str, place: Place, **options: Any) -> Any:
    """What ``kind.from_pretrained``, which is untyped, finds at ``source``.

    Args:
        kind: a class of transformers: a model, tokenizer or image processor.
        source: a folder, ``s3://bucket/prefix`` or a hub id.
        revision: of a hub id; empty for the newest.

    Raises:
        ModelUnavailable: files missing, no access, no network, or files of another model.
    """
    where = _locate(source, place)
    try:
        return kind.from_pretrained(where, revision=revision or None, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, HTTPError) as error:
        lacks = f"files of a {kind.__name__}"
        reason = (
            _one_line(error) if Path(where).is_dir() else _of_hub(error, where, revision, lacks)
        )
        raise ModelUnavailable(f"{source} cannot be loaded as {kind.__name__}: {reason}") from error


@contextmanager
def foreign(package: str, files: str) -> Iterator[None]:
    """What a package's own loader raises, as one error that names the files.

    Raises:
        ModelUnavailable: no access, no network, a file that is missing or another model's.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelUnavailable(
            f"the package {package!r} cannot load {files}: {_one_line(error)}"
        ) from error


def weights(source: str, file: str, revision: str, place: Place) -> dict[str, Tensor]:
    """The tensors in one file of ``source``; a torch file may have them below ``state_dict``.

    Raises:
        ModelUnavailable: the file is missing, out of reach, or holds no tensors by name.
    """
    path = _file(source, file, revision, place)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ModelUnavailable(f"{path} cannot be read: {_one_line(error)}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ModelUnavailable(f"{path} holds no tensors by name, so no weights")
    return dict(found)


def assign(module: torch.nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Put weights into a module; all of them and no others.

    Raises:
        ModelUnavailable: names or shapes are another model's.
    """
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise ModelUnavailable(f"{what} does not fit: {_one_line(error)}") from error


def _file(source: str, file: str, revision: str, place: Place) -> Path:
    where = _locate(source, place)
    folder = Path(where)
    if not folder.is_dir():
        try:
            return Path(hf_hub_download(where, file, revision=revision or None))
        except (OSError, ValueError, HTTPError) as error:
            reason = _of_hub(error, where, revision, file)
            raise ModelUnavailable(f"{source} gives no {file}: {reason}") from error
    if not (folder / file).is_file():
        raise ModelUnavailable(f"there is no {file} in {folder}")
    return folder / file


def _locate(source: str, place: Place) -> str:
    try:
        return models.locate(source, place.cache)
    except ModelUnavailable as error:
        raise ModelUnavailable(str(error).removeprefix("spec.model.source: ")) from error


def _of_hub(error: Exception, name: str, revision: str, lacks: str) -> str:
    field = "the reward's revision parameter"
    return models.hub_error(error, name, revision, lacks=lacks, revision_field=field)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
