"""Scorers by name: the built-in ones, those of installed packages, and any class by its path."""

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from tempflow_api.errors import RewardFailed, TempFlowError, of_code
from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import (
    aesthetic,
    clip,
    digits,
    geneval,
    hpsv2,
    hpsv3,
    image_reward,
    jpeg,
    ocr,
    remote,
    unified_reward,
)
from tempflow_trainer.rewards.base import Place, Reward, Scorer, Term
from tempflow_trainer.rewards.transport import Absent

log = logging.getLogger(__name__)

ENTRY_POINTS = "tempflow.rewards"
"""The group in which an installed package names its scorers."""

REWARDS: dict[str, Callable[..., Scorer]] = {
    "digit-log-probability": digits.DigitLogProbability,
    "digit-probability": digits.DigitProbability,
    "digit-ink": digits.Ink,
    "digit-contrast": digits.StrokeContrast,
    "digit-symmetry": digits.Symmetry,
    "digit-judge": digits.DigitJudge,
    "pickscore": clip.PickScore,
    "clipscore": clip.ClipScore,
    "aesthetic": aesthetic.Aesthetic,
    "hpsv2": hpsv2.HpsV2,
    "ocr": ocr.Ocr,
    "geneval": geneval.GenEval,
    "jpeg-compressibility": jpeg.JpegCompressibility,
    "jpeg-incompressibility": jpeg.JpegIncompressibility,
    "hpsv3": hpsv3.HpsV3,
    "image-reward": image_reward.ImageReward,
    "unified-reward": unified_reward.UnifiedReward,
}


Connected = Mapping[str, Scorer]
"""Scorers that compute elsewhere, by the name of their term."""


def elsewhere(term: RewardTerm) -> bool:
    """Whether a server computes the scores, and not this process."""
    kind = REWARDS.get(term.uses or term.name)
    return term.is_served or kind is unified_reward.UnifiedReward


def connect(
    terms: Sequence[RewardTerm], stop_requested: Callable[[], bool] = lambda: False
) -> Connected:
    """The scorers whose scores a server computes, each after it has answered: seconds now instead
    of an error when the model is loaded and the first images are drawn. Those that start with the
    run are waited for. One that is not required and not there has missing scores until it is.

    Raises:
        RewardFailed: a required one is not there, or one serves another reward.
        Preempted: asked to stop meanwhile.
    """
    found: dict[str, Scorer] = {}
    for index, term in enumerate(terms):
        if not elsewhere(term):
            continue
        path = f"spec.rewards[{index}]"
        scorer: Any = _scorer(term, path, Place())
        where = f"{path}.service" if term.is_served else path
        try:
            scorer.meet(stop_requested)
        except Absent as error:
            if term.required:
                raise RewardFailed(f"{where}: {error}") from error
            log.warning(
                "%s: %s; it is not required: until then its scores are missing", where, error
            )
        except RewardFailed as error:
            raise RewardFailed(f"{where}: {error}") from error
        found[term.name] = scorer
    return found


def build(
    terms: Sequence[RewardTerm], place: Place | None = None, connected: Connected | None = None
) -> Reward:
    """The scorers of a job, ready to score; without ``place`` on the CPU, without ``connected``
    after asking the servers.

    Raises:
        RewardFailed: a reward or parameter that does not exist, a value that does not fit, or a
            scorer that cannot be imported or constructed.
        ModelUnavailable: files of a scorer's model are missing or out of reach.
    """
    where = place or Place()
    far = connect(terms) if connected is None else connected
    return Reward(
        [
            Term(
                t.name,
                t.weight,
                far[t.name] if elsewhere(t) else _scorer(t, f"spec.rewards[{i}]", where),
                t.required,
            )
            for i, t in enumerate(terms)
        ]
    )


def installed() -> dict[str, str]:
    """Scorers that installed packages offer: ``module:Class`` by name."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def _scorer(term: RewardTerm, path: str, place: Place) -> Scorer:
    if term.is_served:
        return remote.of_term(term, path)
    name = term.uses or term.name
    field = f"{path}.uses" if term.uses else f"{path}.name"
    kind = find(name, field)
    known = parameters_of(kind)
    arguments: dict[str, object] = {}
    for key, text in term.parameters.items():
        if key not in known:
            raise RewardFailed(
                f"{path}.parameters.{key}: {name} has no such parameter; it has "
                + (", ".join(known) or "none")
            )
        arguments[key] = _value(text, known[key].annotation, f"{path}.parameters.{key}")
    if "place" in inspect.signature(kind).parameters:
        arguments["place"] = place
    try:
        return kind(**arguments)
    except TempFlowError as error:
        raise of_code(error.exit_code, f"{path}: {name}: {error}") from error
    except Exception as error:  # code of any package: it must name the reward, not only itself
        raise RewardFailed(
            f"{path}: {name} cannot be made: {type(error).__name__}: {error}"
        ) from error


def find(name: str, field: str) -> Callable[..., Scorer]:
    """The class of that name or path; ``field`` says where the name stands.

    Raises:
        RewardFailed: it does not exist, exists twice, or cannot be imported.
    """
    others = installed()
    if name in REWARDS and name in others:
        raise RewardFailed(
            f"{field}: {name!r} is built in, and {others[name]} of an installed package too; name "
            "the latter by its path, or rename its entry point"
        )
    if name in REWARDS:
        return REWARDS[name]
    if ":" in name:
        return _import(name, field)
    if name in others:
        return _import(others[name], field)
    names = [*REWARDS, *others]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise RewardFailed(
        f"{field}: no reward {name!r}{hint} This version has {', '.join(REWARDS)}; installed "
        f"packages offer {', '.join(others) or 'none'}; any class is named as module:Class"
    )


def parameters_of(kind: Callable[..., Scorer]) -> Mapping[str, inspect.Parameter]:
    """What ``spec.rewards[].parameters`` may set."""
    found = inspect.signature(kind).parameters
    return {name: parameter for name, parameter in found.items() if name != "place"}


def _import(path: str, field: str) -> Callable[..., Scorer]:
    module, _, attribute = path.partition(":")
    try:
        kind: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the import runs code of any package
        raise RewardFailed(
            f"{field}: {path} cannot be imported: {type(error).__name__}: {error}; its package "
            "must be installed where the trainer runs"
        ) from error
    if not callable(getattr(kind, "score", None)):
        raise RewardFailed(f"{field}: {path} is no scorer: it has no method score")
    return kind  # type: ignore[no-any-return]


def _value(text: str, kind: object, path: str) -> object:
    # Annotations are text in modules that postpone them.
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "str")
    convert = _CONVERT.get(name.split(" |")[0], str)
    try:
        return convert(text)
    except ValueError as error:
        expected = "true or false" if convert is _truth else name
        raise RewardFailed(f"{path}: got {text!r}, expected {expected}") from error


def _truth(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError as error:
        raise ValueError(text) from error


_CONVERT: dict[str, Callable[[str], object]] = {"int": int, "float": float, "bool": _truth}
