"""GenEval: whether a picture shows the objects, numbers, colours and places that were asked for
(Ghosh et al., arXiv 2310.11513).

A prompt's metadata has ``include``, a list of requirements: ``class``, ``count`` and, if asked
for, ``color``, ``position: [relation, index of an earlier requirement]``; ``exclude``, a list of
``class`` and ``count`` that must not be reached; and ``tag``, where ``counting`` counts only sure
objects.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tempflow_trainer.rewards.base import Place
from tempflow_trainer.rewards.clip import CLIP_L, pictures
from tempflow_trainer.rewards.detector import COLOURS, MASK2FORMER, ColourReader, Detector, Found

Form = Literal["partial", "strict", "official"]
Relation = Literal["left of", "right of", "above", "below"]
Objects = Mapping[str, Sequence[Found]]
ColoursOf = Callable[[Sequence[Found], str], list[str]]
"""The colour of each object of a class."""

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MOST_OBJECTS = 16
POSITION_MARGIN = 0.1


class Requirement(BaseModel):
    """One entry of ``include``."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(alias="class")
    count: int = Field(ge=1)
    color: Literal[COLOURS] | None = None  # type: ignore[valid-type]
    position: tuple[Relation, int] | None = None


class Exclusion(BaseModel):
    """One entry of ``exclude``."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(alias="class")
    count: int = Field(ge=1)


class Task(BaseModel):
    """What a prompt asks for; other keys of the metadata are left alone."""

    tag: str = ""
    include: list[Requirement] = Field(min_length=1)
    exclude: list[Exclusion] = []


def task_of(prompt: str, metadata: Mapping[str, object], classes: frozenset[str]) -> Task:
    """The task in a prompt's metadata.

    Raises:
        ValueError: it is missing, malformed, or asks for what the detector does not know.
    """
    try:
        task = Task.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"the metadata of prompt {prompt!r} is no task of GenEval: {place}: {first['msg']}; "
            'expected include: [{"class": ..., "count": ...}] in its line of a .jsonl file'
        ) from error
    for name in [entry.name for entry in task.include] + [entry.name for entry in task.exclude]:
        if name not in classes:
            raise ValueError(f"prompt {prompt!r}: the detector knows no class {name!r}")
    for index, requirement in enumerate(task.include):
        if requirement.position and not 0 <= requirement.position[1] < index:
            raise ValueError(f"prompt {prompt!r}: include.{index}.position names no earlier entry")
    return task


def relations(one: Found, other: Found) -> set[str]:
    """How ``one`` lies to ``other``: by their centres, less a margin of a tenth of their sizes."""
    (a, b), margin = (one.box, other.box), POSITION_MARGIN
    offset = [((a[i] + a[i + 2]) - (b[i] + b[i + 2])) / 2 for i in (0, 1)]
    sizes = [(a[i + 2] - a[i]) + (b[i + 2] - b[i]) for i in (0, 1)]
    beyond = [
        math.copysign(max(abs(o) - margin * size, 0), o)
        for o, size in zip(offset, sizes, strict=True)
    ]
    if all(abs(distance) < 1e-3 for distance in beyond):
        return set()
    across, down = (distance / math.hypot(*offset) for distance in beyond)
    found = {
        "left of": across < -0.5,
        "right of": across > 0.5,
        "above": down < -0.5,
        "below": down > 0.5,
    }
    return {relation for relation, holds in found.items() if holds}


def official(task: Task, objects: Objects, colours_of: ColoursOf) -> float:
    """1 if everything that is asked for is there and nothing excluded is, else 0. More objects
    than asked for do not matter: the surest count."""
    matched: list[Sequence[Found]] = []
    right = True
    for want in task.include:
        found = list(objects.get(want.name, ()))[: want.count]
        good = len(found) >= want.count
        if good and want.color is not None:
            good = colours_of(found, want.name).count(want.color) >= want.count
        if good and want.position is not None:
            good = _placed(found, want.position, matched)
        matched.append(found if good else ())
        right = right and good
    excluded = any(len(objects.get(no.name, ())) >= no.count for no in task.exclude)
    return float(right and not excluded)


@dataclass(frozen=True)
class Credit:
    """How much of a task is fulfilled."""

    partial: float
    """Mean of the single credits; a number of objects counts 1 - |found - asked| / asked."""
    strict: float
    """1 if every number, colour and place is exactly as asked for, else 0."""


def credit(task: Task, objects: Objects, colours_of: ColoursOf) -> Credit:
    """The form to train with, as in Flow-GRPO's reward server: exact numbers, partial credit.
    ``exclude`` has no part in it."""
    earned: list[float] = []
    matched: list[Sequence[Found]] = []
    exact = True
    for want in task.include:
        found = objects.get(want.name, ())
        earned.append(1 - abs(want.count - len(found)) / want.count)
        good = len(found) == want.count
        if not good and (want.color or want.position):
            earned.append(0.0)
        if good and want.color is not None:
            coloured = colours_of(found, want.name).count(want.color)
            earned.append(1 - abs(want.count - coloured) / want.count)
            good = coloured == want.count
        if good and want.position is not None:
            good = _placed(found, want.position, matched)
            earned.append(float(good))
        matched.append(found if good else ())
        exact = exact and good
    return Credit(sum(earned) / len(earned), float(exact))


def _placed(
    found: Sequence[Found], position: tuple[Relation, int], matched: Sequence[Sequence[Found]]
) -> bool:
    relation, index = position
    targets = matched[index]
    return bool(targets) and all(
        relation in relations(one, target) for one in found for target in targets
    )


class GenEval:
    """``credit`` (forms ``partial``, below or at 1, and ``strict``, 0 or 1) or ``official``."""

    def __init__(
        self,
        form: str = "partial",
        detector: str = MASK2FORMER,
        clip: str = CLIP_L,
        detector_revision: str = "",
        clip_revision: str = "",
        batch_size: int = 8,
        *,
        place: Place,
    ) -> None:
        if form not in get_args(Form):
            raise ValueError(f"form is {form!r}, expected one of {', '.join(get_args(Form))}")
        self.form, self.batch_size = form, batch_size
        self.detector = Detector.load(detector, detector_revision, place)
        self.reader = ColourReader.load(clip, clip_revision, place)

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        classes = self.detector.classes
        tasks = [task_of(p, m, classes) for p, m in zip(prompts, metadata, strict=True)]
        images = pictures(images_N3HW)
        found = self.detector.find(images, THRESHOLD)
        values = []
        for image, task, everything in zip(images, tasks, found, strict=True):
            values.append(self._judge(image, task, surest(everything, task.tag)))
        return torch.tensor(values)

    def _judge(self, image: Any, task: Task, objects: Objects) -> float:
        def colours_of(found: Sequence[Found], name: str) -> list[str]:
            return self.reader.colours(image, found, name)

        if self.form == "official":
            return official(task, objects, colours_of)
        earned = credit(task, objects, colours_of)
        return earned.partial if self.form == "partial" else earned.strict


def surest(objects: Objects, tag: str) -> dict[str, list[Found]]:
    """Of each class the at most 16 that are sure enough; counting wants them surer."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    return {
        name: [one for one in found if one.score > least][:MOST_OBJECTS]
        for name, found in objects.items()
    }
