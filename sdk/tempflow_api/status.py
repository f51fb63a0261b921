"""What the operator observes of a job, as it stands in ``status``."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from tempflow_api.base import Section, Text, Timestamp, Uri
from tempflow_api.course import POINTS

# A pod's report goes into status: no number may be one that JSON or the API server refuses.
Count = Annotated[int, Field(ge=0, le=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Phase = Literal[
    "Pending",
    "Starting",
    "Running",
    "Suspending",
    "Suspended",
    "Restarting",
    "Succeeded",
    "Failed",
]


class Observed(Section):
    """A block of status: a newer operator may have written keys that this version ignores."""

    model_config = ConfigDict(extra="ignore")


class Condition(Observed):
    """One fact about the job, in the form that ``kubectl wait`` understands."""

    type: Annotated[str, Field(max_length=64, pattern=r"^[A-Z][A-Za-z]*$")]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(max_length=64, pattern=r"^[A-Z][A-Za-z]*$")]
    message: Annotated[str, Field(max_length=4096)] = ""
    last_transition_time: Timestamp
    observed_generation: Count = 0


class Replicas(Observed):
    """Pods of the current attempt."""

    desired: Count = 0
    running: Count = 0
    succeeded: Count = 0
    failed: Count = 0


class Restarts(Observed):
    """Attempts after the first, by what ended the one before."""

    failures: Count = 0
    """These count against ``spec.runPolicy.maxRestarts``."""
    disruptions: Count = 0
    preflights: Count = 0
    """After attempts that ended before training, as ``spec.compute.preflight`` found a node unfit;
    these count against ``spec.runPolicy.maxPreflightRestarts``."""


class Progress(Observed):
    """What rank 0 says of itself; the trainer writes it, the operator copies it."""

    epoch: Count
    """Epochs completed."""
    epochs: Count
    step: Count = 0
    """Updates of the weights so far, over all epochs, as rank 0 last told: a job that has succeeded
    may have made a few more."""
    phase: Literal[
        "starting",
        "self-test",
        "rollout",
        "scoring",
        "update",
        "evaluation",
        "checkpoint",
        "done",
    ]
    attempt: Count = 0
    incarnation: Count = 0
    """Start of that attempt, from 1, as the ledger of the checkpoints counts them."""
    run_id: Text = ""
    """Of which run it is the progress; an address may have been another job's pod before."""
    reward: Finite | None = None
    """Mean reward of the last epoch's draws."""
    reward_course: Annotated[list[Finite], Field(max_length=POINTS)] = []
    """From the first epoch to the last one that counts: each number is the mean reward of an equal
    share of the epochs, to four digits."""
    images_per_second: Finite | None = None
    """Images drawn and scored, over the last epoch."""
    eta_seconds: Finite | None = None
    alarms: Annotated[list[Text], Field(max_length=16)] = []
    """What the guard found wrong with the last epoch or evaluation."""
    rollbacks: Count = 0
    """How often the guard went back to a checkpoint."""
    checkpoint_epoch: Count | None = None
    """Epochs completed in the last complete checkpoint."""
    checkpoint_uri: Uri | None = None
    failed_saves: Count = 0
    """Checkpoints in a row, up to now, that could not be stored; ``spec.checkpoint.maxFailedSaves``
    of them end the attempt."""
    time: Timestamp

    @property
    def start(self) -> tuple[int, int]:
        """Attempt and start of it: the higher one is the newer."""
        return self.attempt, self.incarnation


class LastCheckpoint(Observed):
    """The newest complete checkpoint that any attempt reported; the next attempt starts from it."""

    epoch: Count
    """Epochs completed in it."""
    uri: Uri | None = None


class Failure(Observed):
    """Where a failed attempt began to fail."""

    pod: Text = ""
    node: Text = ""
    container: Text = ""
    exit_code: int | None = None
    reason: Text = ""
    """As Kubernetes names it, for instance ``OOMKilled`` or ``PreemptionByScheduler``."""
    message: Annotated[str, Field(max_length=4096)] = ""
    """The last line that the container left behind."""


class Attempt(Observed):
    """One gang of pods, from start to end."""

    number: Count
    outcome: Literal[
        "Active", "Succeeded", "Failed", "Disrupted", "Suspended", "Cancelled", "Unfit"
    ]
    start_time: Timestamp | None = None
    running_time: Timestamp | None = None
    """When all its pods ran for the first time since then."""
    end_time: Timestamp | None = None
    failure: Failure | None = None


class JobStatus(Observed):
    """The observed state of a job."""

    phase: Phase = "Pending"
    """A summary for people, derived from the conditions; programs read the conditions."""
    observed_generation: Count = 0
    conditions: Annotated[list[Condition], Field(max_length=16)] = []
    attempt: Count = 0
    """Number of the current attempt, from 1."""
    attempt_started_at: Timestamp | None = None
    """When the current attempt's pods were first allowed to start."""
    next_attempt_at: Timestamp | None = None
    """The next attempt starts no earlier."""
    active_seconds: Count = 0
    """What ended attempts count towards ``spec.runPolicy.activeDeadlineSeconds``."""
    replicas: Replicas = Replicas()
    restarts: Restarts = Restarts()
    start_time: Timestamp | None = None
    completion_time: Timestamp | None = None
    progress: Progress | None = None
    progress_text: Annotated[str, Field(max_length=32)] = ""
    """Epochs completed of epochs asked for, as one word for ``kubectl get``."""
    progress_moved_at: Timestamp | None = None
    """When progress last changed, by the operator's clock."""
    checkpoint: LastCheckpoint | None = None
    attempts: Annotated[list[Attempt], Field(max_length=10)] = []
    """The last ten."""
