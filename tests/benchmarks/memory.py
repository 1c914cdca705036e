"""(d) What a rollout stores for a pair, and an epoch's peak of resident memory, against the formula of the docs."""

from __future__ import annotations

from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from lightning_fdfo.guards.memory import rollout_bytes
from lightning_fdfo.rollout.points import allocate_points
from tests.benchmarks.report import Table
from tests.benchmarks.timing import ROUNDS, interleaved, median, within
from tests.processes import FORKS
from tests.rollout.test_peak_memory import PAIRS, SHAPE, STEPS, added

CASES = ((5, "float32"), (20, "float32"), (40, "float32"), (40, "bfloat16"))
"""Points kept of a pair's, and the dtype of their velocities."""
LIMIT = 1.15
MIB = 2**20
COLUMNS = {
    "points": "points kept",
    "store": "velocities",
    "stored": "stored a pair, MiB",
    "formula": "formula a pair, MiB",
    "peak": "peak a pair, MiB",
    "ratio": "peak / formula",
    "limit": "limit",
    "within": "kept",
}


def stored_bytes(points: int, store: str) -> int:
    """Bytes of the tensors that are allocated for a pair before its rollout."""
    kept = allocate_points(range(1), STEPS, points, SHAPE, seed=0, epoch=0, store=getattr(torch, store))
    return kept.latents.nbytes + kept.velocities.nbytes + kept.ends.nbytes


def peak_bytes(points: int, store: str) -> float:
    """What an epoch adds to the peak of a new process: a peak never falls."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_send_peak, args=(theirs, points, store))
    process.start()
    theirs.close()
    added_bytes: float = ours.recv()
    process.join()
    return added_bytes


def _send_peak(to: Connection, points: int, store: str) -> None:
    to.send(added(points, store))


def measure(quick: bool = False) -> Table:
    """A row for each number of points and dtype."""
    rounds = 1 if quick else ROUNDS
    runs = {case: partial(peak_bytes, *case) for case in (CASES[:1] if quick else CASES)}
    rows = [_row(*case, peaks) for case, peaks in interleaved(runs, rounds).items()]
    what = f"{PAIRS} pairs of {STEPS} steps, latents {list(SHAPE)}"
    return Table("memory", f"Memory of a rollout, {what}", COLUMNS, rows, f"medians of {rounds} new processes")


def _row(points: int, store: str, peaks: list[float]) -> dict[str, Any]:
    told = rollout_bytes(1, points, torch.Size(SHAPE).numel(), 0, getattr(torch, store).itemsize)
    peak = median(peaks) / PAIRS
    return {
        "points": f"{points} of {2 * STEPS}",
        "store": store,
        "stored": stored_bytes(points, store) / MIB,
        "formula": told / MIB,
        "peak": peak / MIB,
        "ratio": peak / told,
        "limit": LIMIT,
        "within": within(peak / told, LIMIT),
        "peaks": peaks,
    }
