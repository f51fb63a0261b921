"""Where a model's files are: a folder, an object store, or the Hugging Face hub."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import fsspec
import torch
from botocore.exceptions import BotoCoreError
from huggingface_hub import constants, get_token, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the client's
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from tempflow_api.errors import ModelUnavailable
from tempflow_trainer.models.download import check_hub_files, fetch

BUILTIN = "builtin:"
ASSETS = Path(str(files("tempflow_trainer"))) / "assets"
INDEX = "model_index.json"
# Of a model in the diffusers layout all that says what it is; a few kilobytes.
CONFIGURATIONS = (INDEX, "*/config.json", "scheduler/scheduler_config.json")
# Images of rewards have a release below 1, where there is but the general one.
_NO_ENTRY = getattr(hub_errors, "RemoteEntryNotFoundError", EntryNotFoundError)


def locate(source: str, cache: Path) -> str:
    """A local folder with the model's files, or the hub id to ask diffusers for.

    ``s3://`` prefixes are copied below ``cache`` first; a copy that is already there is used.

    Raises:
        ModelUnavailable: a folder or prefix that does not exist or is empty.
    """
    if source.startswith(BUILTIN):
        return str(ASSETS / source.removeprefix(BUILTIN))
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

    Weights are read from safetensors only: other files may run code while they are read.

    Raises:
        ModelUnavailable: files missing, no access, no network, or another kind of model.
    """
    refused = f"spec.model.source: {source} cannot be loaded as {kind.__name__}: "
    try:
        folder = Path(source) if Path(source).is_dir() else _from_hub(kind, source, revision)
        _check_files(kind, folder)
        return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except ModelUnavailable as error:
        raise ModelUnavailable(f"{refused}{error}") from error
    except torch.OutOfMemoryError:
        raise
    # RuntimeError: weights that are not of its configuration. ImportError: a package is missing.
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelUnavailable(f"{refused}{_one_line(error)}") from error


def _from_hub(kind: Any, name: str, revision: str | None) -> Path:
    """The folder in the hub's cache, with everything that the pipeline reads."""
    try:
        index = hf_hub_download(name, INDEX, revision=revision)
        _check_kind(kind, Path(index).parent)
        folder = Path(kind.download(name, revision=revision, use_safetensors=True))
        check_hub_files(folder)
        return folder
    except (OSError, ValueError, HTTPError) as error:
        raise ModelUnavailable(hub_error(error, name, revision)) from error


def configurations(source: str, revision: str | None, cache: Path) -> Path:
    """A folder with what the model's configuration says; of its weights nothing is read.

    Raises:
        ModelUnavailable: nothing is there, or no access.
    """
    if source.startswith("s3://"):
        return _fetch(source, cache, CONFIGURATIONS)
    place = locate(source, cache)
    if Path(place).is_dir():
        return Path(place)
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=[*CONFIGURATIONS]))
    except (OSError, ValueError, HTTPError) as error:
        reason = hub_error(error, place, revision)
        raise ModelUnavailable(
            f"spec.model.source: the configuration of {source} cannot be had: {reason}"
        ) from error


def hub_error(
    error: BaseException,
    name: str,
    revision: str | None,
    *,
    lacks: str = f"{INDEX}: expected a model in the diffusers layout",
    revision_field: str = "spec.model.revision",
) -> str:
    """What is missing, and how to get it. The libraries wrap the cause several times."""
    causes: list[BaseException] = []
    found: BaseException | None = error
    while found is not None:
        causes.append(found)
        found = found.__cause__ or found.__context__
    site = constants.ENDPOINT
    reasons: dict[tuple[type[BaseException], ...], str] = {
        (GatedRepoError,): (
            f"its licence has to be accepted at {site}/{name}, and a token of that account given "
            f"as HF_TOKEN (on a cluster by spec.compute.secretName); {_token_state()}"
        ),
        (RevisionNotFoundError,): f"it has no revision {revision!r}: see {revision_field}",
        (RepositoryNotFoundError,): (
            f"there is no such model at {site}, or it is private and HF_TOKEN may not read it; "
            f"{_token_state()}"
        ),
        (_NO_ENTRY,): f"it has no {lacks}",
        (OfflineModeIsEnabled,): (
            "it is not in the local cache, and HF_HUB_OFFLINE forbids the network"
        ),
        (HfHubHTTPError,): f"{site} refuses: {_one_line(error)}",
        (LocalEntryNotFoundError, HTTPError): (
            f"{site} does not answer, and it is not in the local cache; check the network and "
            "HTTPS_PROXY, or copy the model to a folder or to s3://"
        ),
    }
    for kinds, reason in reasons.items():
        if any(isinstance(cause, kinds) for cause in causes):
            return reason
    return _one_line(error)


def _token_state() -> str:
    return "a token is set" if get_token() else "no token is set"


def _check_kind(kind: Any, folder: Path) -> dict[str, Any]:
    """The index of a pipeline: its class, and the class of each part."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelUnavailable(
            f"there is no {INDEX} in {folder}: expected a folder in the diffusers layout"
        ) from error
    except (ValueError, OSError) as error:
        raise ModelUnavailable(f"{folder / INDEX} cannot be read: {error}") from error
    found = index.get("_class_name")
    if found != kind.__name__:
        raise ModelUnavailable(f"it is a {found}; see spec.model.family")
    return index


def _check_files(kind: Any, folder: Path) -> None:
    """Name what is missing before minutes of loading, and by its path."""
    for part, described in _check_kind(kind, folder).items():
        is_part = isinstance(described, list) and described[:1] != [None]
        if part.startswith("_") or not is_part:
            continue
        if not (folder / part).is_dir():
            raise ModelUnavailable(f"the folder {folder / part} is missing")
        for index in (folder / part).glob("*.safetensors.index.json"):
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError) as error:
                raise ModelUnavailable(f"{index} is damaged: {error}") from error
            missing = sorted(s for s in shards if not (folder / part / s).is_file())
            if missing:
                raise ModelUnavailable(
                    f"{len(missing)} of {len(shards)} files of weights are missing, the first is "
                    f"{folder / part / missing[0]}"
                )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fetch(source: str, cache: Path, patterns: Sequence[str] = ("*",)) -> Path:
    try:
        filesystem, prefix = fsspec.url_to_fs(
            source, use_listings_cache=False, skip_instance_cache=True
        )
        return fetch(filesystem, source, prefix, cache, patterns)
    except FileNotFoundError as error:
        raise ModelUnavailable(f"spec.model.source: there is nothing at {source}") from error
    except (OSError, BotoCoreError) as error:
        raise ModelUnavailable(
            f"spec.model.source: {source} cannot be read: {_one_line(error)}"
        ) from error
