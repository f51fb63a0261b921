"""Tables in Markdown and the plot of `benchmarks/learning.py`."""

import math
import statistics
from pathlib import Path

import matplotlib as mpl

from benchmarks.learning_runs import BUDGETS, QUARTERS, Benchmark, Line
from benchmarks.methods import CONTROL, METHODS

mpl.use("Agg")
from matplotlib import pyplot as plt

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
# Two-sided 95 % of Student's t, by degrees of freedom.
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
MEASURES = {
    "reward": "trained reward",
    "digit-judge": "independent judge",
    "diversity": "diversity within a digit",
}
COLOURS = ("#c0392b", "#e67e22", "#8e44ad", "#16a085", "#2980b9", "#2c3e50", "#95a5a6")


def tables(benchmark: Benchmark) -> str:
    """All tables, as they stand in the document."""
    parts = [_costs(benchmark), *(_comparison(benchmark, budget) for budget in BUDGETS)]
    return "\n".join([*parts, _grid(benchmark)])


def write(benchmark: Benchmark) -> None:
    """Print the tables, put them into the document, and draw the plot."""
    text = tables(benchmark)
    print(text)
    _draw(benchmark)
    if benchmark.scale.document is not None:
        document = Path(benchmark.scale.document)
        if document.is_file():
            before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
            after = rest.partition(END)[2]
            document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def series(benchmark: Benchmark, method: str, budget: str, measure: str) -> list[list[float]]:
    """Of every seed, the values at the quarters of the budget."""
    quarters = benchmark.quarters(method, budget)
    found = []
    for task in benchmark.reported_tasks():
        if task.method == method:
            points = {p["epoch"]: p for p in benchmark.results.lines[task.key]["points"]}
            found.append([points[q][measure] if q in points else math.nan for q in quarters])
    return found


def _costs(benchmark: Benchmark) -> str:
    timing = benchmark.timing()
    base: Line = timing["base"]
    rows = [
        (
            f"Before training: reward {base['reward']:.2f}, judge {base['digit-judge']:.3f}, "
            f"diversity {base['diversity']:.3f}. torch {timing['torch']}.\n"
        ),
        (
            "| method | evaluations an epoch | seconds an epoch | epochs at equal evaluations "
            "| epochs at equal time |"
        ),
        "|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        epochs = [benchmark.quarters(name, budget)[-1] for budget in BUDGETS]
        rows.append(
            f"| {method.label} | {timing['evaluations'][name]:,} | {timing['seconds'][name]:.3f} "
            f"| {epochs[0]} | {epochs[1]} |"
        )
    return "\n".join(rows) + "\n"


def _comparison(benchmark: Benchmark, budget: str) -> str:
    title = {"evaluations": "Equal network evaluations", "seconds": "Equal time"}[budget]
    seeds = len(benchmark.scale.seeds)
    rows = [
        (
            f"**{title}**, {seeds} seeds, mean and standard deviation over them; the last column "
            "is the mean of (TempFlow-GRPO - method) in reward at the end, seed by seed, with its "
            "95 % interval.\n"
        ),
        (
            "| method | reward at 25 / 50 / 75 % | reward at the end | judge at 25 / 50 / 75 % "
            "| judge at the end | diversity at the end | TempFlow-GRPO ahead by |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for name, method in (METHODS | CONTROL).items():
        reward, judge, diversity = (series(benchmark, name, budget, m) for m in MEASURES)
        ahead = "" if name == "tempflow" else _ahead(benchmark, budget, reward)
        rows.append(
            f"| {method.label} | {_means(reward, 2)} | {_end(reward, 2)} | {_means(judge, 2)} "
            f"| {_end(judge, 3)} | {_end(diversity, 3)} | {ahead} |"
        )
    return "\n".join(rows) + "\n"


def _means(by_seed: list[list[float]], digits: int) -> str:
    columns = list(zip(*by_seed, strict=True))[:-1]
    return " / ".join(f"{statistics.mean(column):.{digits}f}" for column in columns)


def _end(by_seed: list[list[float]], digits: int) -> str:
    last = [values[-1] for values in by_seed]
    spread = statistics.stdev(last) if len(last) > 1 else math.nan
    return f"{statistics.mean(last):.{digits}f} ± {spread:.{digits}f}"


def _ahead(benchmark: Benchmark, budget: str, reward: list[list[float]]) -> str:
    best = series(benchmark, "tempflow", budget, "reward")
    apart = [ours[-1] - theirs[-1] for ours, theirs in zip(best, reward, strict=True)]
    if len(apart) < 2:
        return f"{apart[0]:+.2f}"
    half = STUDENT[len(apart) - 1] * statistics.stdev(apart) / math.sqrt(len(apart))
    return f"{statistics.mean(apart):+.2f} ± {half:.2f}"


def _grid(benchmark: Benchmark) -> str:
    rates = benchmark.scale.learning_rates
    rows = [
        (
            "**Choice of the learning rate**: reward at the end of the budget of evaluations, mean "
            f"of {len(benchmark.scale.tuning_seeds)} seeds that are not reported.\n"
        ),
        "| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for name, by_rate in benchmark.tuned().items():
        best = benchmark.rate_of(name)
        cells = [f"**{by_rate[r]:.2f}**" if r == best else f"{by_rate[r]:.2f}" for r in rates]
        rows.append(f"| {METHODS[name].label} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _draw(benchmark: Benchmark) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.4), sharex=True)
    base = benchmark.timing()["base"]
    shares = [0.0, *QUARTERS]
    for row, budget in enumerate(BUDGETS):
        for column, (measure, title) in enumerate(MEASURES.items()):
            axis = axes[row][column]
            for colour, (name, method) in zip(COLOURS, (METHODS | CONTROL).items(), strict=True):
                by_seed = series(benchmark, name, budget, measure)
                columns = [[base[measure]] * len(by_seed), *zip(*by_seed, strict=True)]
                means = [statistics.mean(values) for values in columns]
                axis.plot(
                    [100 * share for share in shares],
                    means,
                    color=colour,
                    label=method.label,
                    linewidth=2.4 if name in ("tempflow", "flow") else 1.3,
                    linestyle=":" if name in CONTROL else "-",
                )
                if name in ("tempflow", "flow"):
                    low, high = [min(v) for v in columns], [max(v) for v in columns]
                    places = [100 * share for share in shares]
                    axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set_title(title if row == 0 else "")
            axis.grid(alpha=0.3)
        axes[row][0].set_ylabel(f"equal {'evaluations' if budget == 'evaluations' else 'time'}")
    for axis in axes[1]:
        axis.set_xlabel("% of the budget")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    path = Path(benchmark.scale.plot)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
