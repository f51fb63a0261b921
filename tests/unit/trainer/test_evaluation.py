"""Evaluations: fixed noise, the ranks' shares, diversity, and the picture of it all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tempflow_api.errors import Preempted
from tempflow_trainer.data import Prompt, load_prompts
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.evaluation import Evaluator, diversity, write_grid
from tempflow_trainer.main import build_run, evaluator_of
from tempflow_trainer.models import families
from tempflow_trainer.rewards.base import Reward, Term
from tests.numerics.toys import Brightness, prompts_of, run_of, spec_of
from tests.unit.trainer.family_cases import ALONE, CPU, SD3
from tests.unit.trainer.sessions import after

law = settings(max_examples=25, deadline=None, derandomize=True)


def evaluator(changes: dict[str, object] | None = None) -> Evaluator:
    spec = spec_of(
        {"evaluation": {"steps": 4, "prompts": 3, "imagesPerPrompt": 5}, **(changes or {})}
    )
    return evaluator_of(spec, run_of(spec), prompts_of(spec))


def test_the_same_weights_give_the_same_images() -> None:
    first, second = evaluator().run(), evaluator().run()
    assert torch.equal(first.images_PM3HW, second.images_PM3HW)
    assert torch.equal(first.total, second.total)
    assert first.images_PM3HW.shape == (3, 5, 3, 2, 2)
    assert first.images_PM3HW.dtype == torch.uint8


def test_noise_is_fixed_for_a_prompt_whatever_else_is_drawn() -> None:
    many = evaluator()
    few = replace(many, prompts=many.prompts[1:2], images_per_prompt=2)
    assert torch.equal(few.run().images_PM3HW[0], many.run().images_PM3HW[1, :2])
    small_calls = replace(many, walker=replace(many.walker, rows_per_call=2))
    difference = small_calls.run().images_PM3HW.int() - many.run().images_PM3HW.int()
    assert difference.abs().max() <= 1  # of 255: rounding of batches of another size


def test_images_of_one_prompt_and_of_two_prompts_differ() -> None:
    images = evaluator().run().images_PM3HW.flatten(2)
    distinct = {tuple(row.tolist()) for prompt in images for row in prompt}
    assert len(distinct) == 15


def test_held_out_rewards_are_scored_and_not_counted() -> None:
    plain = evaluator()
    terms = [Term("brightness", 2.0, Brightness()), Term("judge", 0.0, Brightness())]
    found = replace(plain, reward=Reward(terms)).run()
    assert set(found.scores) == {"brightness", "judge"}
    torch.testing.assert_close(found.total, 2 * found.scores["judge"])


def test_only_the_first_prompts_are_evaluated() -> None:
    assert [p.text for p in evaluator().prompts] == ["a one", "a two", "a three"]


def test_metadata_reaches_the_scorer() -> None:
    seen: list[object] = []

    class Reading(Brightness):
        def score(
            self,
            images_N3HW: torch.Tensor,
            prompts: Sequence[str],
            metadata: Sequence[Mapping[str, object]],
        ) -> torch.Tensor:
            seen.extend(zip(prompts, metadata, strict=True))
            return super().score(images_N3HW, prompts, metadata)

    plain = evaluator()
    prompts = [Prompt(0, "a", {"count": 1}), Prompt(1, "b", {"count": 2})]
    reward = Reward([Term("reading", 1.0, Reading())])
    replace(plain, prompts=prompts, images_per_prompt=2, reward=reward).run()
    assert seen == [("a", {"count": 1})] * 2 + [("b", {"count": 2})] * 2


@law
@given(
    prompts=st.integers(1, 7),
    count=st.integers(1, 5),
    world=st.integers(1, 5),
    compares=st.booleans(),
)
def test_ranks_that_work_in_step_draw_as_many_images(
    prompts: int, count: int, world: int, compares: bool
) -> None:
    class Comparing(Brightness):
        group_wise = compares

    plain = replace(
        evaluator(), images_per_prompt=count, reward=Reward([Term("best", 1.0, Comparing())])
    )
    ranks = [replace(plain.ranks, rank=rank, world=world) for rank in range(world)]
    every = [replace(plain, ranks=one, equal_shares=True) for one in ranks]
    jobs = prompts * count
    drawn = [one._share(jobs, one.ranks.rank).tolist() for one in every]
    assert sorted(index for own in drawn for index in own) == list(range(jobs))
    assert len({len(own) + one._filling(jobs) for one, own in zip(every, drawn, strict=True)}) == 1


@law
@given(images=st.integers(1, 9), at_a_time=st.integers(1, 4), world=st.integers(1, 4))
def test_ranks_ask_one_another_equally_often_whether_to_stop(
    images: int, at_a_time: int, world: int
) -> None:
    """Else one would wait in a collective that another one never enters."""

    @dataclass(frozen=True)
    class Asked(Ranks):
        def any(self, flag: bool) -> bool:
            asked[self.rank] += 1
            return flag

    plain = evaluator({"evaluation": {"steps": 2, "prompts": 1, "imagesPerPrompt": images}})
    asked = [0] * world
    for rank in range(world):
        one = replace(
            plain,
            ranks=Asked(rank, world, 0),
            walker=replace(plain.walker, rows_per_call=at_a_time),
        )
        mine = len(one._share(images, rank))
        jobs = [(one.prompts[0], image) for image in range(mine)]
        assert len(one._draw(jobs, one._calls(images), lambda: False)) == mine
    assert asked == [math.ceil(math.ceil(images / world) / at_a_time)] * world


@pytest.mark.parametrize("stops", range(4))
def test_an_evaluation_stops_before_any_of_its_calls(stops: int) -> None:
    plain = evaluator({"evaluation": {"steps": 2, "prompts": 2, "imagesPerPrompt": 4}})
    calls = replace(plain, walker=replace(plain.walker, rows_per_call=2))
    count = calls.walker.policy.evaluations
    with pytest.raises(Preempted):
        calls.run(after(stops))
    assert count["evaluation"] == stops * 2 * 2
    assert len(calls.run(after(4)).total) == 8


def noise_images(prompts: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (prompts, count, 3, 4, 5), generator=generator, dtype=torch.uint8)


@law
@given(prompts=st.integers(1, 4), count=st.integers(2, 30), seed=st.integers(0, 2**32 - 1))
def test_diversity_is_the_mean_distance_of_pairs(prompts: int, count: int, seed: int) -> None:
    images = noise_images(prompts, count, seed)
    scaled = images.double() / 255
    distances = [
        float((scaled[p, i] - scaled[p, j]).square().mean().sqrt())
        for p in range(prompts)
        for i in range(count)
        for j in range(i)
    ]
    assert diversity(images) == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert diversity(images[:, order]) == pytest.approx(diversity(images), rel=1e-5)


@pytest.mark.parametrize("count", [2, 8, 64])
def test_equal_images_have_no_diversity(count: int) -> None:
    images = noise_images(2, 1, seed=0).expand(-1, count, -1, -1, -1)
    assert diversity(images) == pytest.approx(0, abs=1e-6)


def test_black_and_white_are_as_far_apart_as_can_be() -> None:
    images = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    images[0, 1] = 255
    assert diversity(images) == pytest.approx(1)


def test_one_image_has_no_diversity() -> None:
    assert diversity(noise_images(2, 1, seed=0)) is None


@pytest.mark.parametrize(("side", "enlarged"), [(14, 56), (8, 56), (60, 60)])
def test_a_grid_shows_every_image_without_smoothing(
    tmp_path: Path, side: int, enlarged: int
) -> None:
    images = torch.randint(0, 256, (2, 3, 3, side, side), dtype=torch.uint8)
    file = tmp_path / "grids" / "epoch-000001.png"
    write_grid(images, ["a one", "a very long prompt that does not fit"], file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    grid = Image.open(file).convert("RGB")
    cell = enlarged + 2
    assert grid.size == (120 + 3 * cell, 2 * cell)
    factor = enlarged // side
    for row in range(2):
        for column in range(3):
            for y, x in ((0, 0), (side - 1, side // 2)):
                place = (120 + column * cell + x * factor, row * cell + y * factor)
                assert grid.getpixel(place) == tuple(images[row, column, :, y, x].tolist())


def test_a_grid_replaces_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "grid.png"
    for value in (0, 255):
        write_grid(torch.full((1, 1, 3, 56, 56), value, dtype=torch.uint8), [""], file)
    assert Image.open(file).convert("RGB").getpixel((130, 10)) == (255, 255, 255)


def test_an_evaluation_has_its_own_size_and_guidance(tmp_path: Path) -> None:
    """Twice the rows for guidance, counted with the run's; other images; the size that is asked."""
    spec = SD3.spec(tmp_path)
    plain = spec.evaluation.model_copy(update={"steps": 2, "prompts": 1, "images_per_prompt": 1})

    def drawn(**changes: object) -> tuple[torch.Tensor, int]:
        asked = plain.model_copy(update=changes)
        job = spec.model_copy(update={"evaluation": asked})
        model = families.load(job.model, cache=tmp_path, device=CPU)
        run = build_run(job, model, load_prompts(job), ALONE, CPU, lambda: False)
        images = evaluator_of(job, run, load_prompts(job)).run().images_PM3HW
        return images, run.policy.evaluations["evaluation"]

    as_trained, rows = drawn()
    assert (as_trained.shape[-2:], rows) == ((16, 32), 4)
    same, _ = drawn(guidance_scale=spec.sampling.guidance_scale)
    assert torch.equal(same, as_trained)
    unguided, rows = drawn(guidance_scale=1.0)
    assert rows == 2
    assert not torch.equal(unguided, as_trained)
    larger, _ = drawn(width=48, height=32)
    assert larger.shape[-2:] == (32, 48)
