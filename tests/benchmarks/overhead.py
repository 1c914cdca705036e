"""(a) `fit` against a bare loop of the same mathematics, epoch by epoch in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer

from tests.benchmarks.bare_loop import BareLoop
from tests.benchmarks.report import Table
from tests.benchmarks.timing import median, ratio, within
from tests.benchmarks.tiny_flow import Sizes, fit, make_module, quiet

REALISTIC = 192
"""Width from which a batch of 8 points and more is of a realistic size: below, a step is over in milliseconds."""
LIMIT, LIMIT_OF_SMALL = 1.05, 1.15


class Case(NamedTuple):
    """A model, and how it is timed."""

    layers: int
    width: int
    threads: int
    pairs: int
    rounds: int


CASES = (Case(2, 64, 1, 48, 11), Case(4, 128, 1, 32, 7), Case(4, 192, 2, 48, 7), Case(4, 384, 2, 24, 7))
QUICK = (Case(2, 32, 1, 4, 1),)
SMALL_BATCH = 8
"""Points of a batch where several are accumulated; in the other case all of an update's points are one batch."""
COLUMNS = {
    "model": "model",
    "batches": "batches an update",
    "threads": "threads",
    "fit": "epoch of `fit`, s",
    "bare": "bare, s",
    "rollout": "rollout, ratio",
    "training": "training, ratio",
    "total": "total, ratio (95 %)",
    "limit": "limit",
    "within": "kept",
}


class InTurns(Callback):
    """After each epoch of `fit` runs the same one of the bare loop, and times both.

    An epoch of `fit` lasts from the start of one to the start of the next, with all hooks and files of its end.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.bare: BareLoop | None = None
        self.times: dict[str, list[tuple[float, float]]] = {"fit": [], "bare": []}
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        transformer = pl_module.flow.transformer
        self.bare = BareLoop(self.sizes, {name: p for name, p in transformer.named_parameters() if p.requires_grad})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch:
            self._turn(trainer.current_epoch - 1, pl_module.collector.end)
        self._began = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._turn(trainer.max_epochs - 1, pl_module.collector.end)

    def _turn(self, epoch: int, rolled: float) -> None:
        self.times["fit"].append((rolled - self._began, time.perf_counter() - rolled))
        self.times["bare"].append(self.bare.epoch(epoch))

    def seconds(self, which: str, part: slice) -> list[float]:
        """Of the counted epochs: not the first, in which libraries set up, nor the last, which ends the run."""
        return [sum(one[part]) for one in self.times[which][1:-1]]


def compare(sizes: Sizes, rounds: int) -> tuple[InTurns, float]:
    """Trains both, and returns their times and the largest difference of a weight in the end."""
    turns, module = InTurns(sizes), make_module(sizes)
    with tempfile.TemporaryDirectory() as folder, quiet():
        fit(module, rounds + 2, Path(folder), turns)
    trained = dict(module.flow.transformer.named_parameters())
    return turns, max((trained[name] - p).abs().max().item() for name, p in turns.bare.trained.items())


def measure(quick: bool = False) -> Table:
    """A row for each model and number of batches."""
    rows = []
    for case in QUICK if quick else CASES:
        for batch_size in (case.pairs * Sizes.points, SMALL_BATCH):
            sizes = Sizes(layers=case.layers, width=case.width, pairs=case.pairs, batch_size=batch_size)
            with threads(case.threads):
                turns, difference = compare(sizes, case.rounds)
            rows.append(_row(case, sizes, turns) | {"largest_difference_of_a_weight": difference})
    rounds = min(row["rounds"] for row in rows)
    return Table(
        "overhead", "`fit` against a bare loop", COLUMNS, rows, f"medians of {rounds} epochs or more, in turns"
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads a process, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row(case: Case, sizes: Sizes, turns: InTurns) -> dict[str, Any]:
    parts = {"rollout": slice(0, 1), "training": slice(1, 2), "total": slice(0, 2)}
    ratios = {name: ratio(turns.seconds("fit", part), turns.seconds("bare", part)) for name, part in parts.items()}
    limit = LIMIT if case.width >= REALISTIC else LIMIT_OF_SMALL
    seconds = {which: turns.seconds(which, parts["total"]) for which in turns.times}
    return {
        "model": f"{case.layers} layers of width {case.width}",
        "batches": sizes.pairs * sizes.points // sizes.batch_size,
        "threads": case.threads,
        "rounds": case.rounds,
        **{which: median(each) for which, each in seconds.items()},
        "rollout": ratios["rollout"].value,
        "training": ratios["training"].value,
        "total": ratios["total"],
        "limit": limit,
        "within": within(ratios["total"].value, limit),
        "seconds": seconds,
    }
