"""The built-in rewards, by name."""

import difflib
import inspect
from collections.abc import Callable, Sequence

from tempflow_api.errors import RewardFailed
from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import digits
from tempflow_trainer.rewards.base import Reward, Scorer, Term

REWARDS: dict[str, Callable[..., Scorer]] = {
    "digit-log-probability": digits.DigitLogProbability,
    "digit-probability": digits.DigitProbability,
    "digit-ink": digits.Ink,
    "digit-contrast": digits.StrokeContrast,
    "digit-symmetry": digits.Symmetry,
    "digit-judge": digits.DigitJudge,
}


def build(terms: Sequence[RewardTerm]) -> Reward:
    """The scorers of a job.

    Raises:
        RewardFailed: a reward or parameter that does not exist, or a value that does not fit.
    """
    return Reward(
        [Term(t.name, t.weight, _scorer(t, f"spec.rewards[{i}]")) for i, t in enumerate(terms)]
    )


def _scorer(term: RewardTerm, path: str) -> Scorer:
    if term.name not in REWARDS:
        near = difflib.get_close_matches(term.name, REWARDS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise RewardFailed(
            f"{path}.name: no reward {term.name!r}{hint} This version has {', '.join(REWARDS)}"
        )
    kind = REWARDS[term.name]
    known = inspect.signature(kind).parameters
    arguments: dict[str, object] = {}
    for name, text in term.parameters.items():
        if name not in known:
            raise RewardFailed(
                f"{path}.parameters.{name}: {term.name} has no such parameter; it has "
                + (", ".join(known) or "none")
            )
        arguments[name] = _value(text, known[name].annotation, f"{path}.parameters.{name}")
    return kind(**arguments)


def _value(text: str, kind: object, path: str) -> object:
    # Annotations are text in modules that postpone them.
    convert = {int: int, float: float, "int": int, "float": float}.get(kind, str)
    try:
        return convert(text)
    except ValueError as error:
        raise RewardFailed(f"{path}: got {text!r}, expected {convert.__name__}") from error
