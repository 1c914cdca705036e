"""Collects the runs of a head-to-head: results.csv has a row a run, curves.csv a row an epoch.

python examples/head_to_head/collect.py runs/head_to_head
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

Row = dict[str, float | str]


def epochs(folder: Path) -> list[dict[str, float]]:
    """What a run has logged, an epoch a row."""
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for file in sorted(folder.glob("csv/**/metrics.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                rows[int(float(row["epoch"]))] |= {name: float(value) for name, value in row.items() if value}
    return [row for _, row in sorted(rows.items()) if "reward/mean" in row]


def curve(rows: list[dict[str, float]], batching: dict[str, int], num_steps: int) -> Iterator[Row]:
    """The reward against images that were generated and against seconds of rollouts and training."""
    images = 2 * batching["num_pairs"]
    points = batching["num_pairs"] * (batching["num_points_per_pair"] or 2 * num_steps)
    seconds = 0.0
    for number, row in enumerate(rows):
        yield {"epoch": number, "images": number * images, "seconds": seconds, "reward": row["reward/mean"]}
        seconds += images / row["rollout/images_per_second"] + points / row["train/points_per_second"]
        seconds += row.get("rollout/targets_seconds", 0.0)


def diversity(folder: Path) -> float:
    """Root mean square of the difference of a prompt's images, pixels from 0 to 1."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in folder.glob("**/*.png"):
        groups[file.name.partition("-")[0]].append(file)
    squares = []
    for files in groups.values():
        images = []
        for file in sorted(files):
            with Image.open(file) as image:
                images.append(np.asarray(image, dtype=np.float64) / 255)
        squares += [((one - other) ** 2).mean() for i, one in enumerate(images) for other in images[:i]]
    return float(np.mean(squares) ** 0.5)


def collect(folder: Path) -> tuple[list[Row], list[Row]]:
    """Rows of all complete runs below a folder, and of their epochs."""
    runs, curves = [], []
    for run in sorted(mark.parent for mark in folder.glob("*/complete")):
        rows = epochs(run)
        model = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]
        method, _, seed = run.name.rpartition("-")
        name: Row = {"method": method.partition("@")[0], "seed": seed}
        name["lr"] = model["optimizer"]["init_args"]["lr"]
        found = [name | row for row in curve(rows, model["batching"], model["sampling"]["num_steps"])]
        validated = [row for row in rows if "val/exact_match" in row]
        runs.append(
            name
            | {
                "mean reward": sum(row["reward/mean"] for row in rows) / len(rows),
                "exact match": validated[-1]["val/exact_match"],
                "best exact match": max(row["val/exact_match"] for row in validated),
                "reward": validated[-1]["val/reward"],
                "drift": [row["train/drift"] for row in rows if "train/drift" in row][-1],
                "diversity": diversity(run / "predict"),
            }
        )
        curves += found
    return runs, curves


def main() -> None:
    """Writes results.csv and curves.csv beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the study's, with a folder a run")
    folder = parser.parse_args().folder
    runs, curves = collect(folder)
    if not runs:
        parser.error(f"{folder} holds no run that is complete: start examples/head_to_head/run.sh first")
    for name, rows in (("results.csv", runs), ("curves.csv", curves)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(f"{len(runs)} runs: {folder / 'results.csv'}")


if __name__ == "__main__":
    main()
