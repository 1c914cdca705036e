"""The shipped configurations with a small model and few pairs in place of the big ones; their callbacks unchanged."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.runs.test_parallel import ROOT, flat, trained

TINY = {
    "flow": {"class_path": "StableDiffusion3", "init_args": {"pretrained": "tiny-digits", "max_sequence_length": 0}},
    "rewards": {"Colorfulness": {"reward": "Colorfulness", "weight": 0.1, "scale": "std"}},
    "evaluation": {"metrics": None},
    "sampling": {"num_steps": 2, "height": 32, "width": 64, "churn": 0.05},
    "batching": {
        "num_pairs": 4,
        "updates_per_epoch": 1,
        "num_points_per_pair": None,
        "batch_size": 16,
        "rollout_batch_size": 4,
    },
}
EMA = {"class_path": "lightning_fdfo.callbacks.EMA", "init_args": {"decay": 0.5}}
"""Beside the callbacks of a configuration: none of them brings it."""
TIMINGS = ("seconds", "per_second")
"""Ends of logged names whose values are no two runs' own."""


def words(name: str, folder: Path, epochs: int, *more: str, **model: Any) -> list[str]:
    """The command's, for a configuration in `configs/`; the run goes to `folder / "run"`."""
    config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config["model"].items() if key in ("objective", "lora", "optimizer")}
    config["model"] = TINY | kept | model
    (folder / "val.txt").write_text('"12" in red\n"345" in blue\n', encoding="utf-8")
    config["data"] = {"train": "configs/prompts/digits_train.txt", "val": str(folder / "val.txt")}
    config["trainer"] |= {"accelerator": "cpu", "devices": 1, "max_epochs": epochs, "enable_progress_bar": False}
    config["trainer"]["callbacks"].append(EMA)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["fit", "--config", str(path), *more, f"--trainer.default_root_dir={folder / 'run'}"]


def last(folder: Path) -> dict[str, Any]:
    """What last.ckpt of a run's folder holds."""
    saved: dict[str, Any] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return saved


def loras(folder: Path) -> dict[str, bytes]:
    """The exported files, averaged and raw, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("lora*/*"))}


def logged(folder: Path) -> dict[int, dict[str, str]]:
    """step -> name -> value as written, of all lives of a run; a later one's take the place of an earlier one's."""
    rows: dict[int, dict[str, str]] = {}
    for path in sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values = {name: value for name, value in row.items() if value and not name.endswith(TIMINGS)}
                rows[int(row["step"])] = rows.get(int(row["step"]), {}) | values
    return rows


def is_the_same(folder: Path, whole: Path) -> None:
    """All that a run is in the end: weights, optimiser, scheduler, average, scales, steps, files, and logged rows."""
    one, other = (
        trained(saved) | dict(flat(saved["lr_schedulers"], "scheduler")) for saved in map(last, (whole, folder))
    )
    assert set(one) == set(other)
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []
    assert loras(folder) == loras(whole)
    assert logged(folder) == logged(whole)
