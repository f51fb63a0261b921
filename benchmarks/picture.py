"""The README's picture of a run: images before and after, and the curves between.

tempflow run examples/digits.yaml
python -m benchmarks.picture runs/digits docs/img/demo.png
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from tempflow_api import checkpoint_layout as layout
from tempflow_api.record import Evaluation, Metrics
from tempflow_trainer.evaluation import LABEL_PIXELS
from tempflow_trainer.metrics import Record

COLUMNS, CELL_PIXELS = 8, 58


def show(axes: Axes, run: Path, evaluation: Evaluation, title: str) -> None:
    """The first columns of an evaluation's grid."""
    grid = Image.open(run / str(evaluation.grid))
    axes.imshow(grid.crop((0, 0, LABEL_PIXELS + COLUMNS * CELL_PIXELS, grid.height)))
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def curves(axes: Axes, metrics: list[Metrics], evaluations: list[Evaluation]) -> None:
    """Reward of every epoch; judge and diversity at every evaluation."""
    axes.plot([m.epoch for m in metrics], [m.reward for m in metrics], color="0.7", lw=1)
    axes.plot(
        [e.epoch for e in evaluations], [e.reward for e in evaluations], "o-", color="tab:blue"
    )
    axes.set_ylabel("reward (grey: of each epoch)", color="tab:blue")
    axes.set_xlabel("epoch")
    held_out = axes.twinx()
    judge = [e.rewards["digit-judge"].mean for e in evaluations]
    held_out.plot([e.epoch for e in evaluations], judge, "s-", color="tab:green", label="judge")
    diversity = [e.diversity or 0.0 for e in evaluations]
    held_out.plot(
        [e.epoch for e in evaluations], diversity, "^-", color="tab:red", label="diversity"
    )
    held_out.set_ylim(0, 1)
    held_out.legend(loc="lower right", fontsize=8)
    axes.set_title("what is rewarded, and what is only watched", fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path, help="PNG to write")
    given = parser.parse_args()
    mpl.use("Agg")
    record = Record(given.run)
    metrics = record.lines(layout.METRICS, Metrics)
    evaluations = record.lines(layout.EVALUATIONS, Evaluation)
    figure, (before, after, lines) = plt.subplots(
        1, 3, figsize=(14, 4.4), width_ratios=(1, 1, 1.1), layout="constrained"
    )
    show(before, given.run, evaluations[0], "before")
    show(after, given.run, evaluations[-1], f"after {evaluations[-1].epoch} epochs")
    curves(lines, metrics, evaluations)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=90)


if __name__ == "__main__":
    main()
