"""Schedules to test laws on: those of the three families, and any shift and number of steps."""

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import settings
from hypothesis import strategies as st

from tempflow_trainer.algorithm import schedule
from tempflow_trainer.algorithm.schedule import Schedule

law = settings(max_examples=20, deadline=None, derandomize=True)
"""Bounded and the same every time: a failure found once is found again."""


def sd3(steps: int = 10, shift: float = 3.0) -> Schedule:
    return schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), steps)


def flux(steps: int = 10, image_tokens: int = 1024) -> Schedule:
    """FLUX.1: 1,024 tokens are 512 pixels, 4,096 are 1,024."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    mu = 0.5 + 0.65 * (image_tokens - 256) / 3840
    grid = np.linspace(1, 1 / steps, steps).tolist()
    return schedule.from_scheduler(scheduler, steps, sigmas=grid, mu=mu)


def qwen(steps: int = 10, image_tokens: int = 1024) -> Schedule:
    """Qwen-Image at 512 pixels; its last noise level is stretched to 0.02."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    mu = 0.5 + 0.4 * (image_tokens - 256) / (8192 - 256)
    grid = np.linspace(1, 1 / steps, steps).tolist()
    return schedule.from_scheduler(scheduler, steps, sigmas=grid, mu=mu)


any_schedule: st.SearchStrategy[Schedule] = st.one_of(
    st.builds(sd3, steps=st.integers(2, 40), shift=st.floats(1, 10)),
    st.builds(flux, steps=st.integers(2, 40), image_tokens=st.integers(256, 4096)),
    st.builds(qwen, steps=st.integers(3, 40), image_tokens=st.integers(256, 8192)),
)
any_noise_level = st.floats(0.05, 2.0)
