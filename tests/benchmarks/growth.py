"""(c) How an epoch's time grows with what it is made of: the exponent of each, with all else equal."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_fdfo.files import write_text
from tests import processes
from tests.benchmarks.overhead import threads
from tests.benchmarks.report import ROOT, Table
from tests.benchmarks.timing import ROUNDS, exponent, interleaved, median, within
from tests.benchmarks.tiny_flow import CHANNELS, EpochClock, Sizes, fit, make_module, quiet

BASE = Sizes(pairs=16, batch_size=32, rollout_batch_size=16)
SMALLEST = Sizes(width=32, side=8, pairs=2, steps=2, points=2, batch_size=2)
"""What `--quick` grows from."""


class Series(NamedTuple):
    """One thing that grows."""

    sizes: Callable[[Sizes, int], Sizes]
    """from the sizes of all runs and a value to the sizes of one"""
    values: tuple[int, ...]
    quick: tuple[int, int]


SERIES = {
    "pairs": Series(lambda base, pairs: replace(base, pairs=pairs), (8, 16, 32, 64, 128, 256), (1, 2)),
    "steps, all of whose points train": Series(
        lambda base, steps: replace(
            base, pairs=base.pairs // 2, batch_size=base.batch_size // 2, steps=steps, points=2 * steps
        ),
        (5, 10, 20, 40, 80),
        (1, 2),
    ),
    "latent size": Series(
        lambda base, numel: replace(base, side=math.isqrt(numel // CHANNELS)), (1024, 4096, 16384), (256, 1024)
    ),
    "batch size": Series(lambda base, size: replace(base, batch_size=size), (1, 4, 16, 64), (1, 2)),
}
LIMITS = dict.fromkeys([*SERIES][:2], 1.05)
COLUMNS = {
    "grows": "what grows",
    "values": "from … to",
    "times": "seconds of an epoch",
    "exponent": "exponent (95 %)",
    "limit": "limit",
    "within": "kept",
}


def epoch_seconds(sizes: Sizes) -> float:
    """Of the second epoch, on one thread."""
    clock = EpochClock()
    with tempfile.TemporaryDirectory() as folder, quiet(), threads(1):
        fit(make_module(sizes), 2, Path(folder), clock)
    return clock.seconds[0]


def process_seconds(devices: int, pairs: int) -> float:
    """The same of the shipped model on so many processes, each with one thread, by DDP: as many pairs in all."""
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text("utf-8"))
    config["model"] |= {"rewards": {"JPEGSize": 1.0}, "evaluation": {"metrics": None}}
    config["model"]["batching"] |= {"num_pairs": pairs, "batch_size": 2 * pairs, "rollout_batch_size": pairs // 2}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clock = {"class_path": f"{EpochClock.__module__}.EpochClock", "init_args": {"file": str(folder / "seconds")}}
        config["trainer"] |= {
            **{"max_epochs": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0, "callbacks": [clock]},
            "default_root_dir": str(folder / "run"),
        }
        write_text(folder / "run.yaml", yaml.safe_dump(config))
        words = ["fit", "--config", str(folder / "run.yaml")]
        if devices > 1:
            words += ["--config", "configs/ddp.yaml", f"--trainer.devices={devices}"]
        processes.run_checked(words, devices)
        return float((folder / "seconds").read_text("utf-8").split()[0])


def measure(quick: bool = False) -> Table:
    """A row for each thing that grows."""
    rounds = 1 if quick else ROUNDS
    rows = []
    for name, series in SERIES.items():
        values, base = (series.quick, SMALLEST) if quick else (series.values, BASE)
        runs = {value: partial(epoch_seconds, series.sizes(base, value)) for value in values}
        rows.append(_row(name, interleaved(runs, rounds), LIMITS.get(name)))
    runs = {devices: partial(process_seconds, devices, 4 if quick else 48) for devices in (1, 2)}
    rows.append(_row("processes, with equal work in all", interleaved(runs, rounds), None))
    return Table("growth", "Growth of an epoch", COLUMNS, rows, f"medians of {rounds} runs each, in turns")


def _row(name: str, measured: Mapping[int, list[float]], limit: float | None) -> dict[str, Any]:
    slope = exponent(measured)
    medians = [median(each) for each in measured.values()]
    return {
        "grows": name,
        "values": f"{min(measured)} … {max(measured)}",
        "times": f"{medians[0]:.3g} … {medians[-1]:.3g}",
        "exponent": slope,
        "seconds": {str(value): each for value, each in measured.items()},
        **({"limit": limit, "within": within(slope.value, limit)} if limit else {}),
    }
