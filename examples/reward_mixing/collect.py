"""Collects the runs of a study into a table: a row a run, its weights and seed, each metric before and after.

python examples/reward_mixing/collect.py runs/reward_mixing
"""

import argparse
import csv
import json
from pathlib import Path

import yaml

TERMS = ("OCR", "small", "red")


def collect(folder: Path) -> list[dict[str, float | str]]:
    """Rows of all complete runs below a folder, in the order of their names."""
    rows = []
    for summary in sorted(folder.glob("*/before_after.json")):
        config = yaml.safe_load((summary.parent / "config.yaml").read_text(encoding="utf-8"))
        weights = {name: config["model"]["rewards"][name]["weight"] for name in TERMS}
        result = json.loads(summary.read_text(encoding="utf-8"))
        row: dict[str, float | str] = {
            "mixture": ":".join(f"{weights[name]:g}" for name in TERMS),
            "seed": config["seed_everything"],
        }
        for name in sorted(result["before"]):
            row |= {f"{name} before": result["before"][name], f"{name} after": result["after"][name]}
        rows.append(row)
    return rows


def main() -> None:
    """Writes results.csv beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the study's, with a folder a run")
    folder = parser.parse_args().folder
    rows = collect(folder)
    if not rows:
        parser.error(f"{folder} holds no run that is complete: start examples/reward_mixing/run.sh first")
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} runs: {folder / 'results.csv'}")


if __name__ == "__main__":
    main()
