"""What a run will do, as ``tempflow explain -o json`` prints it: stable names, snake case.

Counts are of one epoch and of all processes together, unless a field says otherwise. A later
version may add fields; a reader ignores those that it does not know.
"""

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class ScheduleStep(_Part):
    """One denoising step."""

    step: int
    sigma: float
    """Noise level before the step; 1 is noise."""
    sigma_next: float
    """Where the step leads, also if it jumps over others (``algorithm.mergeBelow``)."""
    dt: float
    """``sigma_next - sigma``, negative."""
    noise_std: float
    """Deviation of the noise that the step adds where it is stochastic."""
    weight_raw: float
    """Before the weights are brought to a mean of 1."""
    weight: float
    """In the policy loss: ``weight_raw * weight_normaliser`` at a branch step, else 0."""
    branched: bool
    """Whether the step is stochastic and trained."""


class Groups(_Part):
    """What is compared with what."""

    prompts: int
    seeds: int
    """Start noises a prompt."""
    total: int
    """Start noises: prompts x seeds."""
    steps: int
    """Branch steps."""
    draws: int
    """At each branch step of a start noise."""
    compared: int
    """Draws whose rewards are compared with one another."""


class Evaluations(_Part):
    """Rows that the network computes; guidance that needs a second velocity counts as a row."""

    trunk: int
    """Of the trajectories from the start noises."""
    tails: int
    """Of the draws on their way to an image."""
    training: int
    """For the loss, and where there are several updates, for the log-probabilities before them."""
    without_gradient: int
    """The part of ``training`` that is not differentiated."""
    reference: int
    """By the model before training, for the divergence."""
    total: int
    forward_equivalents: float
    """With a backward pass counted as two forward passes."""


class Geometry(_Part):
    """How the work is cut."""

    processes: int
    groups_least: int
    """Start noises of the process that has fewest."""
    groups_most: int
    """Of the process that has most; the following are of that process."""
    updates: int
    rows_per_update: int
    """(start noise, step) pairs in the largest update."""
    micro_batches_per_update: int
    """Calls with gradient that are accumulated in that update."""
    groups_per_rollout: int
    """Start noises drawn at once."""
    rows_in_flight: int
    """Most latents at a denoising step."""
    rollout_calls: int
    """Calls of the network in a rollout."""
    images: int
    """To decode and score."""


class MemoryBytes(_Part):
    """Of one process; buffers of the CUDA libraries and models of rewards are not counted."""

    transformer: int
    """Weights, trained ones too; with ``strategy: shard`` this process's part, as of all that is
    trained."""
    text_encoders: int
    """In the memory of the host with ``compute.textCacheMebibytes``."""
    autoencoder: int
    gradients: int
    optimizer: int
    """The two moments of every trained weight."""
    average: int
    reference: int
    """A frozen copy, with full tuning and a divergence."""
    rollout: int
    """Most at a time in the calls of a rollout, beyond all weights."""
    scoring: int
    """In decoding a call's rows."""
    update: int
    """In forward and backward of a micro-batch."""
    trajectories: int
    """Latents of an epoch; in the memory of the host."""
    total: int
    """On the device: what stays, and the largest of the three phases. With ``device: cpu`` the
    trajectories, too."""


class Flops(_Part):
    """A multiply-add is two. Text encoders and rewards are not counted."""

    forward: int
    """One row of the network, for scale; the others are of an epoch."""
    rollout: int
    training: int
    """Forward and backward, and the forward before several updates."""
    reference: int
    decoding: int
    total: int


class Seconds(_Part):
    """One epoch at the rate that was asked about."""

    rate_flops: float
    """Floating-point operations a second and process that the rate stands for."""
    rollout: float
    scoring: float
    """Decoding only: how long a reward takes is not known before."""
    update: float
    total: float


class Explanation(_Part):
    """What a run will do."""

    name: str
    model: str
    method: str
    width: int
    height: int
    parameters: int
    """Of the network."""
    trained_parameters: int
    schedule: list[ScheduleStep]
    weighting: str
    """What ``weight_raw`` is: the noise (``noise-aware``), 1 / |dt| (``guard``) or 1 (``none``)."""
    weight_normaliser: float
    """1 / mean of ``weight_raw`` over the branch steps."""
    groups: Groups
    evaluations: Evaluations
    images_scored: int
    geometry: Geometry
    memory_bytes: MemoryBytes
    flops: Flops
    seconds: Seconds | None
    """None without ``--rate``."""
