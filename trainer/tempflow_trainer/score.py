"""Try rewards on picture files: what ``tempflow rewards`` starts."""

import argparse
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from tempflow_api.errors import DeviceMissing, ManifestInvalid, Problem, RewardFailed, TempFlowError
from tempflow_api.v1alpha1 import RewardService, RewardTerm
from tempflow_trainer.rewards import registry
from tempflow_trainer.rewards.base import Place, is_group_wise

# Somebody waits for it at a terminal: less than a run is patient for.
SECONDS_AN_ANSWER = 30.0
# Errors about a reward speak of a manifest; here it was options that somebody typed.
TYPED = {
    "spec.rewards[0].service.tokenVariable": "--token-variable",
    "spec.rewards[0].service": "--endpoint",
    "spec.rewards[0].parameters.": "--set ",
    "spec.rewards[0].uses": "--reward",
    "spec.rewards[0]": "--reward",
    "service.endpoints": "--endpoint",
}


def listing() -> list[dict[str, Any]]:
    """Every scorer that can be named: what it measures, and its parameters with their defaults."""
    found = [_described(name, "built in") for name in registry.REWARDS]
    return found + [_described(name, where) for name, where in registry.installed().items()]


def scores(
    term: RewardTerm, files: Sequence[Path], prompts: Sequence[str], metadata: Any, place: Place
) -> list[float | None]:
    """The score of each picture; None where the reward gives a reason for having none.

    Args:
        term: the reward, with its parameters.
        files: pictures, of any size; of one size for a reward that compares.
        prompts: one for all of them, or one each.
        metadata: of the prompts, an object for all.
        place: where the scorer runs.

    Raises:
        ManifestInvalid: a file is no picture, or the numbers of files and prompts do not fit.
        RewardFailed: the reward does not exist, or fails.
    """
    texts = list(prompts) * len(files) if len(prompts) == 1 else list(prompts)
    if len(texts) != len(files):
        raise _mistake("--prompt", f"{len(texts)} prompts for {len(files)} pictures: one, or each")
    if not isinstance(metadata, dict):
        raise _mistake("--metadata", "expected a JSON object")
    images = [read_picture(file) for file in files]
    reward = registry.build([term.model_copy(update={"weight": 1.0})], place)
    if is_group_wise(reward.terms[0].scorer):
        if len({image.shape for image in images}) > 1:
            raise _mistake("IMAGE", f"{term.name} compares pictures: they must be of one size")
        batches = [torch.stack(images)]
    else:
        batches = [image[None] for image in images]
    values: list[float] = []
    for batch in batches:
        here = texts[len(values) : len(values) + len(batch)]
        facts = [metadata] * len(batch)
        found = reward.score(batch, here, facts, groups=[0] * len(batch))
        values += found[term.name].tolist()
    return [None if math.isnan(value) else value for value in values]


def read_picture(file: Path) -> torch.Tensor:
    """A picture file as 8-bit numbers, [3, H, W].

    Raises:
        ManifestInvalid: it cannot be read, or is no picture.
    """
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _mistake(str(file), f"is no picture that can be read: {error}") from error
    except OSError as error:
        raise _mistake(str(file), f"cannot be read: {error.strerror or error}") from error
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def _mistake(where: str, message: str) -> ManifestInvalid:
    return ManifestInvalid("tempflow rewards score", [Problem(where, message)])


def _described(name: str, where: str) -> dict[str, Any]:
    try:
        kind = registry.find(name, "reward")
    except RewardFailed as error:
        return {"name": name, "from": where, "summary": f"broken: {error}", "parameters": {}}
    summary = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    parameters = {
        key: None if parameter.default is parameter.empty else parameter.default
        for key, parameter in registry.parameters_of(kind).items()
    }
    return {"name": name, "from": where, "summary": summary, "parameters": parameters}


def _term(given: argparse.Namespace) -> RewardTerm:
    parameters = {}
    for pair in given.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise _mistake("--set", f"{pair!r} is not KEY=VALUE")
        parameters[key] = value
    if given.endpoint and parameters:
        raise _mistake("--set", "parameters are set where the reward is served, see --endpoint")
    if given.token_variable and not given.endpoint:
        raise _mistake("--token-variable", "is for a reward that is served, see --endpoint")
    return RewardTerm(
        name="reward",
        uses=_checked("--reward", lambda: RewardTerm(name="reward", uses=given.reward)).uses,
        parameters=parameters,
        service=_service(given) if given.endpoint else None,
    )


def _service(given: argparse.Namespace) -> RewardService:
    try:
        service = RewardService(endpoints=given.endpoint)
    except ValidationError as error:
        expected = "expected addresses such as http://scorer:8090"
        raise _mistake("--endpoint", f"got {' '.join(given.endpoint)}, {expected}") from error
    token = _checked(
        "--token-variable", lambda: RewardService(token_variable=given.token_variable)
    ).token_variable
    waits = {"timeout_seconds": SECONDS_AN_ANSWER, "deadline_seconds": SECONDS_AN_ANSWER}
    return service.model_copy(update={"token_variable": token, **waits})


Checked = TypeVar("Checked")


def _checked(option: str, make: Callable[[], Checked]) -> Checked:
    try:
        return make()
    except ValidationError as error:
        raise _mistake(option, error.errors()[0]["msg"]) from error


def _metadata(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _mistake("--metadata", f"is not JSON: {error}") from error


def _as_typed(message: str) -> str:
    for path, option in TYPED.items():
        message = message.replace(path, option)
    return message


def _place(device: str) -> Place:
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing("--device cuda: there is no GPU here; leave it out")
    return Place(torch.device(device), Path("models"))


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``tempflow rewards`` documents it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", choices=["text", "json"], default="text")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list")
    score = verbs.add_parser("score")
    score.add_argument("--reward", required=True)
    score.add_argument("--prompt", action="append", required=True)
    score.add_argument("--metadata", default="{}")
    score.add_argument("--set", action="append", default=[])
    score.add_argument("--endpoint", action="append", default=[])
    score.add_argument("--token-variable")
    score.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    score.add_argument("files", nargs="+", type=Path)
    return parser.parse_args(words)


def run(given: argparse.Namespace) -> list[str]:
    """The lines to print.

    Raises:
        TempFlowError: what the user got wrong, or what is missing.
    """
    if given.verb == "list":
        entries = listing()
        if given.output == "json":
            return [json.dumps(entries, indent=1)]
        return [line for entry in entries for line in _lines(entry)]
    term, metadata = _term(given), _metadata(given.metadata)
    values = scores(term, given.files, given.prompt, metadata, _place(given.device))
    if given.output == "json":
        rows = [
            {"file": str(file), "score": value}
            for file, value in zip(given.files, values, strict=True)
        ]
        return [json.dumps({"reward": given.reward, "scores": rows}, indent=1)]
    return [
        f"{'none' if value is None else f'{value:.6g}':>12}  {file}"
        for file, value in zip(given.files, values, strict=True)
    ]


def _lines(entry: dict[str, Any]) -> list[str]:
    lines = [f"{entry['name']}  ({entry['from']})", f"    {entry['summary']}"]
    given = {
        key: "required" if value is None else value for key, value in entry["parameters"].items()
    }
    if given:
        lines.append("    " + ", ".join(f"{k}={v!r}" if v != "" else k for k, v in given.items()))
    return lines


def main() -> int:
    """Returns the exit code; an error is one line on stderr."""
    try:
        lines = run(arguments())
    except TempFlowError as error:
        sys.stderr.write(f"error: {_as_typed(str(error))}\n")
        return int(error.exit_code)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0
