"""Draws a study's mixtures against each other, with bars from the lowest seed to the highest, and prints their table.

python examples/reward_mixing/plot.py runs/reward_mixing
"""

import argparse
import csv
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BASE = "base"
MARKERS = "*os^vDPX"
"""Told apart in grey, too; the first is the base model's."""
METRICS = {"exact_match": (100, "read by OCR, %"), "small": (-1, "JPEG, kilobytes"), "red": (1, "redness")}
"""Of results.csv: what each is multiplied by, and its axis."""
FRONTS = (("small", "exact_match"), ("red", "exact_match"), ("small", "red"))
"""Pairs of metrics that are drawn, a panel each."""


class Spread(NamedTuple):
    """A metric of a mixture, over seeds."""

    low: float
    mean: float
    high: float


def spreads(rows: list[dict[str, str]]) -> dict[str, dict[str, Spread]]:
    """By mixture and metric: the spread over seeds; the base model, before training, counts as a mixture."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for metric, (factor, _) in METRICS.items():
            values[row["mixture"]][metric].append(factor * float(row[f"{metric} after"]))
            values[BASE][metric].append(factor * float(row[f"{metric} before"]))
    return {
        mixture: {metric: Spread(min(found), sum(found) / len(found), max(found)) for metric, found in metrics.items()}
        for mixture, metrics in sorted(values.items(), key=lambda item: (item[0] == BASE, item[0]), reverse=True)
    }


def draw(found: dict[str, dict[str, Spread]]) -> Figure:
    """A panel a pair of metrics, a point a mixture."""
    figure = Figure(figsize=(4.6 * len(FRONTS) + 1, 4.4), layout="constrained")
    for axes, (across, up) in zip(figure.subplots(1, len(FRONTS)), FRONTS, strict=True):
        for marker, (mixture, metrics) in zip(cycle(MARKERS), found.items(), strict=False):
            _point(axes, mixture, marker, metrics[across], metrics[up])
        axes.set(xlabel=METRICS[across][1], ylabel=METRICS[up][1])
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", title="OCR : small : red")
    figure.suptitle("bars from the lowest seed to the highest")
    return figure


def _point(axes: Axes, mixture: str, marker: str, x: Spread, y: Spread) -> None:
    bars = [[[value.mean - value.low], [value.high - value.mean]] for value in (x, y)]
    color = "black" if mixture == BASE else None
    style = {"marker": marker, "color": color, "markersize": 8, "capsize": 3, "elinewidth": 1, "linestyle": ""}
    axes.errorbar([x.mean], [y.mean], xerr=bars[0], yerr=bars[1], label=mixture, **style)


def table(found: dict[str, dict[str, Spread]]) -> str:
    """The same numbers in Markdown."""
    lines = [f"| OCR : small : red | {' | '.join(label for _, label in METRICS.values())} |", "|---" * 4 + "|"]
    for mixture, metrics in found.items():
        cells = [f"{metrics[m].mean:.3g} ({metrics[m].low:.3g} to {metrics[m].high:.3g})" for m in METRICS]
        lines.append(f"| {mixture.replace(':', ' : ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Writes mixtures.png beside results.csv."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the study's, with results.csv")
    folder = parser.parse_args().folder
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        found = spreads(list(csv.DictReader(file)))
    draw(found).savefig(folder / "mixtures.png", dpi=110)
    print(table(found))
    print(folder / "mixtures.png")


if __name__ == "__main__":
    main()
