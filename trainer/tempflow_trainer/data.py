"""Prompts, addressed by epoch and position: resume and any number of ranks see the same ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
from botocore.exceptions import BotoCoreError

from tempflow_api.errors import ManifestInvalid, Problem
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import seeds

STATE = "state.json"
SPLITS = "dataset_dict.json"


@dataclass(frozen=True)
class Prompt:
    """One line of the prompt list."""

    id: int
    text: str
    metadata: Mapping[str, object]


@dataclass(frozen=True)
class Group:
    """One start noise of one prompt of an epoch."""

    prompt: Prompt
    position: int
    """Of the prompt within the epoch, 0 .. promptsPerEpoch - 1."""
    seed: int
    """0 .. seedsPerPrompt - 1."""


@dataclass(frozen=True)
class PromptOrder:
    """Which prompts an epoch uses and how its groups are shared."""

    prompts: Sequence[Prompt]
    prompts_per_epoch: int
    seeds_per_prompt: int
    updates_per_epoch: int
    shuffle: bool
    run_seed: int

    def prompt_at(self, epoch: int, position: int) -> Prompt:
        """Passes over the list follow one another without gap, each in an order of its own."""
        count = len(self.prompts)
        passed, index = divmod(epoch * self.prompts_per_epoch + position, count)
        if self.shuffle:
            index = seeds.permutation(count, self.run_seed, "prompts", passed)[index]
        return self.prompts[index]

    def shares(self, epoch: int, *, rank: int, world: int) -> list[list[Group]]:
        """This rank's groups of the epoch, one list an update.

        Every update has an equal share of the prompts; its groups are dealt to the ranks in turn.
        """
        per_update = self.prompts_per_epoch // self.updates_per_epoch
        return [
            [
                Group(self.prompt_at(epoch, position), position, seed)
                for position in range(update * per_update, (update + 1) * per_update)
                for seed in range(self.seeds_per_prompt)
            ][rank::world]
            for update in range(self.updates_per_epoch)
        ]


def load_prompts(spec: JobSpec) -> list[Prompt]:
    """The prompts of the manifest or of its file.

    Raises:
        ManifestInvalid: a file that cannot be read, is empty, or has a broken line.
    """
    if spec.data.prompts is not None:
        return [Prompt(i, text, {}) for i, text in enumerate(spec.data.prompts)]
    source = str(spec.data.prompts_file)
    if not source.endswith((".txt", ".jsonl")) and _has_file(source, STATE):
        return _from_dataset(source)
    if _has_file(source, SPLITS):
        raise _invalid(source, f"holds several splits: name one, as in {source}/train", None)
    # Not splitlines: to Python some characters inside a prompt end a line too.
    lines = _read(source).split("\n")
    parse = _parse_json if source.endswith(".jsonl") else _parse_text
    found = [parse(source, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise _invalid(source, "holds no prompt", None)
    return [Prompt(i, text, metadata) for i, (text, metadata) in enumerate(found)]


def _from_dataset(folder: str) -> list[Prompt]:
    """A dataset as the library ``datasets`` saves it: Arrow streams, listed in a file of state.

    Read by Arrow itself: the library would add a second hub client, pandas and a cache of its own
    for what is one call here.
    """
    import pyarrow

    try:
        files = [part["filename"] for part in json.loads(_read(f"{folder}/{STATE}"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise _invalid(folder, f"{STATE} is damaged: {error!r}", None) from error
    rows: list[dict[str, object]] = []
    for name in files:
        try:
            with fsspec.open(f"{folder}/{name}", "rb") as file:
                rows += pyarrow.ipc.open_stream(file).read_all().to_pylist()
        except (OSError, BotoCoreError, pyarrow.ArrowException) as error:
            raise _invalid(f"{folder}/{name}", f"cannot be read: {error}", None) from error
    if not rows:
        raise _invalid(folder, "holds no prompt", None)
    found = []
    for i, row in enumerate(rows):
        text = row.pop("prompt", None)
        number = i + 1
        if not isinstance(text, str) or not text.strip():
            columns = ", ".join(sorted(row)) or "no other column"
            raise _invalid(
                folder, f'expected a text in column "prompt"; there is {columns}', number
            )
        found.append(Prompt(i, text, row))
    return found


def _has_file(folder: str, name: str) -> bool:
    """Whether there is such a file; a store that does not answer is told when it is read."""
    try:
        filesystem, path = fsspec.url_to_fs(f"{folder}/{name}")
        return bool(filesystem.isfile(path))
    except (OSError, BotoCoreError):
        return False


def _read(source: str) -> str:
    try:
        if "://" not in source:
            return Path(source).read_text(encoding="utf-8")
        with fsspec.open(source, "rt", encoding="utf-8") as file:
            return str(file.read())
    except (OSError, UnicodeDecodeError, BotoCoreError) as error:
        raise _invalid(source, f"cannot be read: {error}", None) from error


def _parse_text(_source: str, _number: int, line: str) -> tuple[str, Mapping[str, object]]:
    return line.strip(), {}


def _parse_json(source: str, number: int, line: str) -> tuple[str, Mapping[str, object]]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _invalid(source, f"not JSON: {error.msg} at column {error.colno}", number) from error
    text = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise _invalid(source, 'expected an object with a text "prompt"', number)
    return record.pop("prompt"), record


def _invalid(source: str, message: str, line: int | None) -> ManifestInvalid:
    return ManifestInvalid(source, [Problem("spec.data.promptsFile", message, line)])
