"""Which checkpoints are kept. Pure: the trainer and ``tempflow checkpoints prune`` delete."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tempflow_api.checkpoint_layout import Folder
from tempflow_api.storage import Checkpoint


@dataclass(frozen=True)
class Retention:
    """Kept is what any of these keeps."""

    keep_last: int
    """The newest so many."""
    keep_every: int | None = None
    """Those after a multiple of so many epochs."""
    best_metric: str = "reward"
    best_count: int = 0
    """So many of those evaluated, by highest mean."""

    @classmethod
    def of(cls, settings: Checkpoint) -> "Retention":
        """What ``spec.checkpoint`` asks for."""
        best = settings.keep_best
        return cls(
            settings.keep_last,
            settings.keep_every,
            best_metric=best.metric if best else "reward",
            best_count=best.count if best else 0,
        )

    def kept(
        self,
        newest_first: Sequence[Folder],
        evaluations: Mapping[str, Mapping[str, float]],
        pinned: frozenset[str],
    ) -> list[Folder]:
        """The folders that are kept, in the same order.

        Args:
            newest_first: those that count.
            evaluations: metrics by folder's name, of those that were evaluated.
            pinned: names of folders that somebody wants kept.
        """
        scores = {
            folder: evaluations[folder.name][self.best_metric]
            for folder in newest_first
            if self.best_metric in evaluations.get(folder.name, {})
        }
        # Of equals the newer one: it comes first, and sorting keeps that.
        best = sorted(scores, key=lambda folder: -scores[folder])[: self.best_count]
        return [
            folder
            for position, folder in enumerate(newest_first)
            if position < self.keep_last
            or (self.keep_every and folder.step % self.keep_every == 0)
            or folder in best
            or folder.name in pinned
        ]
