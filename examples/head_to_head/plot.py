"""Draws the methods' rewards against images and against seconds, with bands over seeds, and prints their table.

python examples/head_to_head/plot.py runs/head_to_head
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

COLUMNS = {
    "mean reward": "reward, mean over epochs",
    "exact match": "read by OCR, %",
    "best exact match": "at best, %",
    "reward": "reward",
    "diversity": "diversity",
    "drift": "drift",
}
"""Of results.csv, and their heads."""
FACTORS = {"exact match": 100, "best exact match": 100}
NAMES = {
    "fdfo": "FDFO",
    "fdfo_plus": "FDFO, with options",
    "awm": "AWM",
    "nft": "DiffusionNFT",
    "flow_grpo": "Flow-GRPO",
    "antithetic": "antithetic pairs",
    "adaptive": "adaptive churn",
    "averaged": "rollouts by the average",
    "together": "all three together",
}


class Mean(NamedTuple):
    """A number over seeds."""

    mean: float
    error: float
    """standard error; 0 for a single seed"""

    @classmethod
    def of(cls, values: list[float]) -> "Mean":
        """The mean of some seeds'."""
        spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return cls(float(np.mean(values)), float(spread))


def means(rows: list[dict[str, str]]) -> dict[tuple[str, str], dict[str, Mean]]:
    """By method and learning rate: each number over seeds."""
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name in COLUMNS:
            values[row["method"], row["lr"]][name].append(FACTORS.get(name, 1) * float(row[name]))
    return {key: {name: Mean.of(each) for name, each in found.items()} for key, found in values.items()}


def table(found: dict[tuple[str, str], dict[str, Mean]]) -> str:
    """The numbers in Markdown, with standard errors."""
    lines = [f"| method | lr | {' | '.join(COLUMNS.values())} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for (method, rate), numbers in found.items():
        cells = [f"{numbers[name].mean:.3g} ± {numbers[name].error:.2g}" for name in COLUMNS]
        lines.append(f"| {NAMES.get(method, method)} | {float(rate):g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, str]]) -> Figure:
    """The reward against images and seconds: means over seeds, and bands of a standard error."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    curves: dict[str, dict[int, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        point = (float(row["images"]), float(row["seconds"]), float(row["reward"]))
        label = NAMES.get(row["method"], row["method"])
        curves[label][int(row["epoch"])].append(point)
    for label, points in curves.items():
        images, seconds, _ = np.array([np.mean(points[epoch], axis=0) for epoch in sorted(points)]).T
        rewards = [Mean.of([reward for _, _, reward in points[epoch]]) for epoch in sorted(points)]
        mean, error = np.array(rewards).T
        for axes, x in ((left, images), (right, seconds)):
            (line,) = axes.plot(x, mean, label=label)
            axes.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
    left.set(xlabel="generated images", ylabel="mean reward of an epoch")
    right.set(xlabel="seconds of rollouts and training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    figure.suptitle("bands: a standard error over seeds")
    return figure


def main() -> None:
    """Writes methods.png beside results.csv."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the study's, with results.csv and curves.csv")
    folder = parser.parse_args().folder
    rows = []
    for name in ("results.csv", "curves.csv"):
        with (folder / name).open(encoding="utf-8", newline="") as file:
            rows.append(list(csv.DictReader(file)))
    draw(rows[1]).savefig(folder / "methods.png", dpi=110)
    print(table(means(rows[0])))
    print(folder / "methods.png")


if __name__ == "__main__":
    main()
