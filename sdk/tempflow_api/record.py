"""What a run writes about itself: the lines and files below ``record/``.

The trainer writes them, the command line and others read them; a reader ignores keys that it does
not know.
"""

from pydantic import Field

from tempflow_api.base import Timestamp
from tempflow_api.status import Observed


class EpochSeconds(Observed):
    """Wall time of one epoch, by phase."""

    rollout: float = 0.0
    scoring: float = 0.0
    update: float = 0.0


class EpochEvaluations(Observed):
    """Rows that the network computed in one epoch, over all processes."""

    rollout: int = 0
    training: int = 0
    """With gradient; one for all draws of a (seed, step) pair."""
    reference: int = 0


class Metrics(Observed):
    """One epoch, a line of ``metrics.jsonl``."""

    epoch: int
    """Epochs completed."""
    time: Timestamp
    reward: float
    """Mean over the draws of all groups that are not left out."""
    reward_std: float
    rewards: dict[str, float]
    """Mean raw score of each trained reward that gave any."""
    missing_scores: dict[str, int] = {}
    """Images that a reward failed with, of ``images``, by reward."""
    groups_left_out: int = 0
    """(group, step) pairs that lack a required score: no part of the update."""
    advantage_zero_share: float
    """Share of (group, step) pairs whose draws all got the same reward: they teach nothing."""
    loss: float
    kl: float
    """Mean divergence of the stochastic steps from the model before training."""
    ratio_clipped_share: float
    """Share of draws whose probability ratio left the clip range."""
    ratio_drift: float
    """Mean |ratio - 1|."""
    grad_norm: float
    """Before it is scaled down."""
    alarms: list[str] = Field(default_factory=list)
    """What the guard found wrong."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint before this epoch."""
    images: int
    images_per_second: float
    seconds: EpochSeconds
    scoring_hidden_seconds: float = 0.0
    """Of scoring, beside the rollout; ``seconds.scoring`` is what the epoch waited for after it."""
    evaluations: EpochEvaluations


class Spread(Observed):
    """A mean and the standard deviation around it."""

    mean: float
    std: float


class Evaluation(Observed):
    """One evaluation, a line of ``evaluations.jsonl``."""

    epoch: int
    time: Timestamp
    reward: float
    reward_std: float
    rewards: dict[str, Spread]
    """Every reward that gave a score, those held out too."""
    missing_scores: dict[str, int] = {}
    """Images that a reward failed with, of ``images``, by reward."""
    diversity: float | None
    """Mean distance of two images of a prompt; None where a prompt has one image."""
    alarms: list[str] = Field(default_factory=list)
    """What the guard found wrong."""
    images: int
    grid: str | None
    """Picture of all images, below the run's folder."""


class SelfTest(Observed):
    """What was found before the first epoch, ``self-test.json``."""

    configuration: str
    """Digest of the settings that it was found with."""
    time: Timestamp
    seconds: float
    device: str
    precision: str
    trained_parameters: int
    tensors_with_gradient: int
    tensors_changed: int
    """Of those with gradient, by one optimizer step."""
    reward: float | None
    """Of the one image that was drawn; None where a score that is not required is missing."""
    rollout_difference: float | None
    """Most that the log-probability of a draw differs between the rollout that made it and the
    update's forward in calls of the same size; None where they are guided differently."""
    full_call_difference: float
    """Most that it differs between the update's calls and some as full as the rollout's."""
    one_row_difference: float
    """Most that it differs in a call of its own."""
    bound: float
    """What a difference may be."""


class Save(Observed):
    """One checkpoint, a line of ``checkpoints.jsonl``, whether it could be stored or not."""

    epoch: int
    time: Timestamp
    stall_seconds: float
    """That training waited: for the copy in memory, and for the save before."""
    stage_seconds: float
    """Writing to local disk, with digests, beside the training."""
    send_seconds: float
    """From the first request to the one that makes it count, beside the training."""
    bytes: int
    folder: str | None
    """Below the run's folder; None if it failed or was skipped."""
    error: str | None


class BeforeAfter(Observed):
    """A figure of the model as it was, and as it is."""

    before: float
    after: float


class RunSeconds(EpochSeconds):
    """Wall time of a run, by phase."""

    total: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0


class Summary(Observed):
    """What a run did, ``summary.json``."""

    epochs: int
    reward_before: Spread
    reward_after: Spread
    rewards: dict[str, BeforeAfter]
    diversity: BeforeAfter | None
    evaluations: int
    """Rows that the network computed, over all phases."""
    images: int
    """Drawn and scored in training."""
    seconds: RunSeconds = Field(default_factory=RunSeconds)
    peak_memory_bytes: int
    """Of the process that used most."""
    result: str
    """The folder with ``adapter`` or ``transformer``."""
