"""Interleaved runs, their medians, and how sure these are.

Two things that are compared run in turns, so that what slows the machine for a while slows both. A median is of at
least `ROUNDS` runs. Intervals hold 95 %, by resampling the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

ROUNDS = 5
"""Runs of which a median is taken, at least; `--quick` takes one."""
RESAMPLES = 2000
Key = TypeVar("Key")


class Estimate(NamedTuple):
    """A number, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def interleaved(runs: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """Calls each once a round.

    Args:
        runs: what is compared, by name; each returns what it measured.
        rounds: how many.

    Returns:
        name -> a number a round.
    """
    measured: dict[Key, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            measured[name].append(run())
    return measured


def median(values: Sequence[float]) -> float:
    """The median.

    Example:
        >>> median([3.0, 1.0, 2.0])
        2.0
    """
    return float(np.median(values))


def ratio(ones: Sequence[float], others: Sequence[float]) -> Estimate:
    """The median of the rounds' ratios.

    Example:
        >>> ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
        Estimate(value=2.0, low=2.0, high=2.0)
    """
    ratios = np.asarray(ones) / np.asarray(others)
    return _resampled(lambda rows: np.median(ratios[rows], axis=-1), len(ratios))


def exponent(measured: Mapping[float, Sequence[float]]) -> Estimate:
    """The slope of log time against log size, by least squares over the medians of each size.

    Args:
        measured: size -> seconds, as many of each size.

    Example:
        >>> exponent({size: [0.1 * size**2] * 3 for size in (1, 2, 4)}).value
        2.0
    """
    sizes = np.log(list(measured))
    times = np.array(list(measured.values()))
    centred = sizes - sizes.mean()

    def slope(rows: np.ndarray) -> np.ndarray:
        logs = np.log(np.median(times[:, rows], axis=-1))
        return np.tensordot(centred, logs, axes=1) / (centred**2).sum()

    return _resampled(slope, times.shape[1])


def _resampled(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> Estimate:
    """A statistic of all rounds, and the 2.5 % and 97.5 % quantiles of those of rounds that are drawn again."""
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile(statistic(drawn), [0.025, 0.975])
    return Estimate(*(round(float(value), 6) for value in (statistic(np.arange(count)), low, high)))


def within(value: float, limit: float | None) -> str:
    """Whether a number keeps to its limit, in a word.

    Example:
        >>> within(1.04, 1.05), within(1.06, 1.05), within(1.06, None)
        ('yes', 'no', '')
    """
    if limit is None:
        return ""
    return "yes" if math.isfinite(value) and value <= limit else "no"
