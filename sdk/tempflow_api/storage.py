"""What a job asks of the store of its checkpoints: a part of ``v1alpha1``."""

from typing import Annotated, Literal

from pydantic import Field

from tempflow_api.base import Name, PositiveInt, Section, Uri


class KeepBest(Section):
    """Checkpoints that evaluate best."""

    metric: Name = "reward"
    """``reward``, or the name of one of ``spec.rewards``, also of one that is held out."""
    count: Annotated[int, Field(ge=1, le=100)] = 1
    """The result is usually the best one."""


class Checkpoint(Section):
    """What survives the processes: the state to continue from, and the result."""

    uri: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=1024,
                pattern=r"^(s3://[a-z0-9][a-z0-9.-]+(/.*)?|file://.+|[^:]+)$",
            ),
        ]
        | None
    ) = None
    """``s3://bucket/prefix`` or a local folder, which gets one sub-folder a run. Without it
    ``tempflow run`` uses ``runs``; on a cluster it is required and starts with ``s3://``."""
    endpoint_url: Annotated[str, Field(max_length=1024, pattern=r"^https?://.+$")] | None = None
    """Address of a store other than Amazon's. Credentials never stand in a manifest: they come
    from the environment, a profile or the pod's identity."""
    region: Annotated[str, Field(max_length=64)] | None = None
    """Of the bucket, where the environment does not say it."""
    every_epochs: PositiveInt = 10
    """Also after the last epoch."""
    keep_last: Annotated[int, Field(ge=2, le=1000)] = 2
    """Older checkpoints are deleted once a new one is complete. At least two, so that a damaged
    one has a predecessor."""
    keep_every: PositiveInt | None = None
    """Also keep those after a multiple of so many epochs, to look back."""
    keep_best: KeepBest | None = None
    """Also keep those with the highest mean of a metric, among those whose epoch was evaluated:
    let ``evaluation.everyEpochs`` and ``everyEpochs`` fall together."""
    save_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = 1800
    """A save that takes longer is given up and counts as failed. Half an hour is a full fine-tune
    of 30 GB at 17 MB/s."""
    max_wait_seconds: Annotated[int, Field(ge=0, le=86_400)] = 600
    """Saves run beside the training, one at a time. When the next one is due, training waits so
    long for the one before; then the new one is skipped, and counts as failed."""
    max_failed_saves: Annotated[int, Field(ge=1, le=1000)] = 3
    """So many failed saves in a row end the run, with exit code 94: its progress would be lost
    with the next fault."""


class InitFrom(Section):
    """A start from what another run has learned."""

    uri: Uri
    """Folder of a run, of which the newest checkpoint is taken, or of one checkpoint: a local path
    or ``s3://``, in the store that ``spec.checkpoint`` describes. It is only read, and only by a
    run that has no checkpoint of its own yet."""
    mode: Literal["resume", "weights"] = "weights"
    """``weights`` begins at epoch 0 with the averaged weights, as they were evaluated, and a new
    optimizer; ``resume`` goes on with all of the state, counting on from its epoch."""
