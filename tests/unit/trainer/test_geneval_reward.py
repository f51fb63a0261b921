"""GenEval: the rules against the published ones written down again, and a tiny detector."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tempflow_api.errors import RewardFailed
from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import registry
from tempflow_trainer.rewards.base import Place
from tempflow_trainer.rewards.clip import pictures
from tempflow_trainer.rewards.detector import (
    COLOURS,
    TEMPLATES,
    ColourReader,
    Detector,
    Found,
    box_of,
    cut_out,
)
from tempflow_trainer.rewards.geneval import Task, credit, official, relations, surest, task_of
from tests import tiny_scorers

law = settings(max_examples=150, deadline=None, derandomize=True)
CLASSES = frozenset({"dog", "cat", "computer mouse"})


def at(left: float, top: float, right: float, bottom: float, score: float = 0.95) -> Found:
    return Found(score, (left, top, right, bottom), torch.ones(1, 1, dtype=torch.bool))


def related(one: Found, other: Found) -> set[str]:
    """The published rule, in its own terms."""
    boxes = np.array([one.box, other.box]).reshape(2, 2, 2)
    centre_a, centre_b = boxes.mean(axis=-2)
    size_a, size_b = np.abs(np.diff(boxes, axis=-2))[..., 0, :]
    offset = centre_a - centre_b
    revised = np.maximum(np.abs(offset) - 0.1 * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    found = [("left of", dx < -0.5), ("right of", dx > 0.5)]
    found += [("above", dy < -0.5), ("below", dy > 0.5)]
    return {name for name, holds in found if holds}


corner = st.integers(0, 40)
side = st.integers(1, 30)
boxes = st.builds(lambda x, y, w, h: at(x, y, x + w, y + h), corner, corner, side, side)


@law
@given(one=boxes, other=boxes)
def test_relations_by_the_published_rule(one: Found, other: Found) -> None:
    assert relations(one, other) == related(one, other)


def test_relations_that_one_sees() -> None:
    middle = at(40, 40, 60, 60)
    assert relations(at(0, 40, 20, 60), middle) == {"left of"}
    assert relations(at(80, 40, 99, 60), middle) == {"right of"}
    assert relations(at(40, 0, 60, 20), middle) == {"above"}
    assert relations(at(40, 80, 60, 99), middle) == {"below"}
    assert relations(middle, middle) == set()
    assert relations(at(41, 40, 61, 60), middle) == set()


def reference(task: dict[str, Any], objects: dict[str, list[Found]], paint: Any) -> list[float]:
    """[official, partial, strict] by the published code's own steps."""
    right = True
    groups: list[list[Found] | None] = []
    for want in task["include"]:
        matched, found = True, objects.get(want["class"], [])[: want["count"]]
        if len(found) < want["count"]:
            right = matched = False
        else:
            if "color" in want and paint(found).count(want["color"]) < want["count"]:
                right = matched = False
            if "position" in want and matched:
                relation, target = want["position"]
                placed = groups[target] is not None and all(
                    relation in related(a, b) for a, b in product(found, groups[target])
                )
                right, matched = right and placed, placed
        groups.append(found if matched else None)
    for no in task.get("exclude", []):
        right = right and len(objects.get(no["class"], [])) < no["count"]
    exact, parts, groups = True, [], []
    for want in task["include"]:
        matched, found = True, objects.get(want["class"], [])
        parts.append(1 - abs(want["count"] - len(found)) / want["count"])
        if len(found) != want["count"]:
            exact = matched = False
            if "color" in want or "position" in want:
                parts.append(0.0)
        else:
            if "color" in want:
                count = paint(found).count(want["color"])
                parts.append(1 - abs(want["count"] - count) / want["count"])
                if count != want["count"]:
                    exact = matched = False
            if "position" in want and matched:
                relation, target = want["position"]
                if groups[target] is None or any(
                    relation not in related(a, b) for a, b in product(found, groups[target])
                ):
                    exact = matched = False
                    parts.append(0.0)
                else:
                    parts.append(1.0)
        groups.append(found if matched else None)
    return [float(right), sum(parts) / len(parts), float(exact)]


@st.composite
def tasks(draw: st.DrawFn) -> dict[str, Any]:
    include: list[dict[str, Any]] = []
    for index in range(draw(st.integers(1, 3))):
        want: dict[str, Any] = {
            "class": draw(st.sampled_from(["dog", "cat"])),
            "count": draw(st.integers(1, 2)),
        }
        if draw(st.booleans()):
            want["color"] = draw(st.sampled_from(["red", "blue"]))
        if index and draw(st.booleans()):
            relation = draw(st.sampled_from(["left of", "right of", "above", "below"]))
            want["position"] = [relation, draw(st.integers(0, index - 1))]
        include.append(want)
    exclude = draw(st.lists(st.just({"class": "cat", "count": 2}), max_size=1))
    return {"include": include, "exclude": exclude}


def paint(found: Sequence[Found]) -> list[str]:
    """A colour for each object, by where it lies."""
    return ["red" if int(one.box[0]) % 3 else "blue" for one in found]


@law
@given(
    task=tasks(),
    objects=st.fixed_dictionaries(
        {}, optional={name: st.lists(boxes, max_size=3) for name in ("dog", "cat")}
    ),
)
def test_the_three_forms_by_the_published_steps(
    task: dict[str, Any], objects: dict[str, list[Found]]
) -> None:
    read = task_of("a", task, CLASSES)
    earned = credit(read, objects, lambda found, _: paint(found))
    strictly = official(read, objects, lambda found, _: paint(found))
    expected = reference(task, objects, paint)
    assert [strictly, earned.partial, earned.strict] == pytest.approx(expected)


def test_credits_by_hand() -> None:
    task = Task.model_validate({"include": [{"class": "dog", "count": 2, "color": "red"}]})
    one, two, three = (at(n, 0, n + 5, 5) for n in (1, 2, 4))

    def all_red(found: Sequence[Found], _: str) -> list[str]:
        return ["red"] * len(found)

    def earned(*dogs: Found) -> tuple[float, float, float]:
        found = credit(task, {"dog": dogs}, all_red)
        return official(task, {"dog": dogs}, all_red), found.partial, found.strict

    assert earned(one, two) == (1.0, 1.0, 1.0)
    assert earned(one) == (0.0, 0.25, 0.0)
    assert earned(one, two, three) == (1.0, 0.25, 0.0)
    assert earned() == (0.0, 0.0, 0.0)


def test_only_sure_objects_count_and_surer_ones_where_they_are_counted() -> None:
    dogs = [at(0, 0, 5, 5, score) for score in (0.99, 0.95, 0.8, 0.31, 0.3)]
    assert len(surest({"dog": dogs}, "position")["dog"]) == 4
    assert len(surest({"dog": dogs}, "counting")["dog"]) == 2
    assert len(surest({"dog": dogs[:1] * 40}, "")["dog"]) == 16


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "is no task of GenEval: include: Field required; expected include: "),
        ({"include": []}, "include: List should have at least 1 item"),
        ({"include": [{"class": "dog"}]}, "include.0.count: Field required"),
        ({"include": [{"class": "dog", "count": 0}]}, "include.0.count: Input should be greater"),
        ({"include": [{"class": "emu", "count": 1}]}, "the detector knows no class 'emu'"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "include.0.color: Input"),
        (
            {"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]},
            "include.0.position names no earlier entry",
        ),
    ],
)
def test_a_malformed_task_says_where(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"prompt 'a dog'") as caught:
        task_of("a dog", metadata, CLASSES)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    detector, clip = tmp_path_factory.mktemp("detector"), tmp_path_factory.mktemp("clip")
    tiny_scorers.save_mask2former(detector)
    tiny_scorers.save_clip(clip)
    return detector, clip


def noise(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96)])
def test_the_detector_finds_what_its_own_library_finds(
    folders: tuple[Path, Path], height: int, width: int
) -> None:
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

    images = pictures(noise(2, height, width))
    detector = Detector.load(str(folders[0]), "", Place())
    assert detector.classes == CLASSES
    processor = Mask2FormerImageProcessorPil.from_pretrained(folders[0])
    inputs = processor(images=images, return_tensors="pt")
    assert torch.equal(detector.pixels(images)["pixel_values"], inputs["pixel_values"])
    with torch.no_grad():
        output = Mask2FormerForUniversalSegmentation.from_pretrained(folders[0]).eval()(**inputs)
    total = 0
    for index, found in enumerate(detector.find(images, 0.05)):
        # The scores once more, query by query: of the class, times the mean of the mask.
        classes = output.class_queries_logits[index].softmax(-1)[:, :-1]
        masks = torch.nn.functional.interpolate(
            output.masks_queries_logits[index][None], size=(384, 384), mode="bilinear"
        )[0]
        inside = masks > 0
        sure = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        best = (classes * sure[:, None]).flatten().tolist()
        scores = sorted((one.score for objects in found.values() for one in objects), reverse=True)
        assert all(min(abs(score - value) for value in best) < 1e-4 for score in scores)
        for objects in found.values():
            assert [one.score for one in objects] == sorted(
                (one.score for one in objects), reverse=True
            )
            for one in objects:
                assert one.mask_HW.shape == (height, width)
                assert one.box == box_of(one.mask_HW)
        total += len(scores)
    assert total > 0


def test_a_box_and_what_is_cut_out() -> None:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[5:9, 10:14] = True
    mask[8, 20] = True
    assert box_of(mask) == (10, 5, 21, 9)
    crop = cut_out(Image.new("RGB", (30, 20), "red"), Found(1.0, box_of(mask), mask))
    assert crop.size == (11, 4)
    assert crop.getpixel((0, 0)) == (255, 0, 0)
    assert crop.getpixel((10, 0)) == (0x99, 0x99, 0x99)
    assert crop.getpixel((10, 3)) == (255, 0, 0)


def test_colours_by_a_zero_shot_classifier(folders: tuple[Path, Path]) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folders[1]).eval()
    processor = CLIPProcessor.from_pretrained(folders[1])
    image = pictures(noise(1, 40, 56))[0]
    objects = [at(0, 0, 30, 40), at(10, 5, 56, 35), at(0, 0, 8, 8)]
    objects = [Found(o.score, o.box, torch.ones(40, 56, dtype=torch.bool)) for o in objects]
    directions = []
    for colour in COLOURS:
        texts = [template.format(colour=colour, name="dog") for template in TEMPLATES]
        tokens = processor(
            text=texts, return_tensors="pt", padding=True, truncation=True, max_length=16
        )
        with torch.no_grad():
            features = model.text_projection(model.text_model(**tokens)[1])
        features = torch.nn.functional.normalize(features).mean(0)
        directions.append(features / features.norm())
    crops = [image.crop(one.box) for one in objects]
    pixels = processor(images=crops, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixel_values=pixels)[1])
    nearest = (torch.nn.functional.normalize(seen) @ torch.stack(directions).T).argmax(1)
    reader = ColourReader.load(str(folders[1]), "", Place())
    assert reader.colours(image, objects, "dog") == [COLOURS[i] for i in nearest.tolist()]


@pytest.mark.parametrize("form", ["partial", "strict", "official"])
def test_a_picture_is_scored_by_the_name_of_the_reward(
    folders: tuple[Path, Path], form: str
) -> None:
    parameters = {"detector": str(folders[0]), "clip": str(folders[1]), "form": form}
    reward = registry.build([RewardTerm(name="geneval", parameters=parameters)])
    task = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    score = reward.score(noise(3, 48, 96), ["a red dog"] * 3, [task] * 3)["geneval"]
    assert bool((score <= 1).all())
    with pytest.raises(RewardFailed, match="reward geneval: the metadata of prompt 'a dog' is no"):
        reward.score(noise(1, 48, 96), ["a dog"], [{}])


class Scene:
    """Detector and colour reader of pictures whose left half is either red or blue: two dogs there,
    the second one doubtful, and a cat on the right."""

    classes = CLASSES

    def find(self, images: Sequence[Image.Image], threshold: float) -> list[dict[str, list[Found]]]:
        assert threshold == 0.3
        assert [one.size for one in images] == [(96, 48)] * len(images)
        dogs = [at(0, 10, 20, 30, 0.95), at(20, 10, 40, 30, 0.8)]
        return [{"dog": dogs, "cat": [at(70, 10, 90, 30, 0.99)]} for _ in images]

    def colours(self, image: Image.Image, found: Sequence[Found], name: str) -> list[str]:
        assert name == "dog"
        reds = [image.getpixel((int(one.box[0]), 20))[0] for one in found]  # type: ignore[index]
        return ["red" if red else "blue" for red in reds]


@pytest.mark.parametrize(
    ("form", "tag", "of_red_dogs", "of_blue_dogs"),
    [
        # One dog too many costs its number, its colour and the place of the cat; the cat is there.
        ("partial", "", 1 / 4, 1 / 4),
        ("strict", "", 0.0, 0.0),
        ("official", "", 1.0, 0.0),
        # Where objects are counted the doubtful dog is none; a wrong colour costs the place, too.
        ("partial", "counting", 1.0, 2 / 4),
        ("strict", "counting", 1.0, 0.0),
        ("official", "counting", 1.0, 0.0),
    ],
)
def test_a_known_scene_has_a_known_score(
    monkeypatch: pytest.MonkeyPatch, form: str, tag: str, of_red_dogs: float, of_blue_dogs: float
) -> None:
    monkeypatch.setattr(Detector, "load", lambda *_: Scene())
    monkeypatch.setattr(ColourReader, "load", lambda *_: Scene())
    reward = registry.build([RewardTerm(name="geneval", parameters={"form": form})])
    pictures_N3HW = torch.zeros(2, 3, 48, 96)
    pictures_N3HW[0, 0, :, :48] = pictures_N3HW[1, 2, :, :48] = 1
    cat = {"class": "cat", "count": 1, "position": ["right of", 0]}
    task = {"tag": tag, "include": [{"class": "dog", "count": 1, "color": "red"}, cat]}
    scores = reward.score(pictures_N3HW, ["a red dog left of a cat"] * 2, [task] * 2)["geneval"]
    assert scores.tolist() == [of_red_dogs, of_blue_dogs]


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(RewardFailed, match="form is 'fuzzy', expected one of partial, strict"):
        registry.build([RewardTerm(name="geneval", parameters={"form": "fuzzy"})])
