"""Schedules to test laws on: those of the three families, as their shipped configurations and the
product's functions make them, and any shift and number of steps."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import settings
from hypothesis import strategies as st

from tempflow_trainer.algorithm import schedule
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.models import packed
from tempflow_trainer.models.source import ASSETS

law = settings(max_examples=20, deadline=None, derandomize=True)
"""Bounded and the same every time: a failure found once is found again."""


SD3, FLUX, QWEN = (
    "stabilityai/stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.1-dev",
    "Qwen/Qwen-Image",
)


@lru_cache
def configuration(source: str) -> dict[str, Any]:
    """The scheduler's, as it ships with the package for the model of a preset."""
    file = ASSETS / "published" / source.replace("/", "--") / "scheduler" / "scheduler_config.json"
    return {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("_")}


def sd3(steps: int = 10, shift: float | None = None) -> Schedule:
    """Stable Diffusion 3.5 Medium, or one with another shift."""
    changed = {} if shift is None else {"shift": shift}
    scheduler = FlowMatchEulerDiscreteScheduler(**configuration(SD3) | changed)
    return schedule.from_scheduler(scheduler, steps)


def flux(steps: int = 10, image_tokens: int = 1024) -> Schedule:
    """FLUX.1: 1,024 tokens are 512 pixels, 4,096 are 1,024."""
    scheduler = FlowMatchEulerDiscreteScheduler(**configuration(FLUX))
    return packed.shifted_schedule(scheduler, steps, image_tokens)


def qwen(steps: int = 10, image_tokens: int = 1024) -> Schedule:
    """Qwen-Image at 512 pixels; its last noise level is stretched to 0.02."""
    scheduler = FlowMatchEulerDiscreteScheduler(**configuration(QWEN))
    return packed.shifted_schedule(scheduler, steps, image_tokens)


FAMILIES: tuple[Callable[[int], Schedule], ...] = (sd3, flux, qwen)
any_family = st.sampled_from(FAMILIES)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=["sd3", "flux", "qwen-image"])

any_schedule: st.SearchStrategy[Schedule] = st.one_of(
    st.builds(sd3, steps=st.integers(2, 40), shift=st.floats(1, 10)),
    st.builds(flux, steps=st.integers(2, 40), image_tokens=st.integers(256, 4096)),
    st.builds(qwen, steps=st.integers(3, 40), image_tokens=st.integers(256, 8192)),
)
any_noise_level = st.floats(0.05, 2.0)
