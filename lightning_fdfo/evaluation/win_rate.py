"""How often one model's image is better than another's of the same prompt and latents, and the uncertainty of that."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_fdfo.evaluation.prompt_mean import sum_by_prompt

RESAMPLES_AT_ONCE = 1000
"""Of the bootstrap; sets memory only."""


class WinRate(NamedTuple):
    """A share of wins, and its interval."""

    rate: float
    """in [0, 1]; NaN if nothing was compared"""
    low: float
    """NaN with fewer than two prompts"""
    high: float


def wins(tuned: Tensor, base: Tensor) -> Tensor:
    """1 where `tuned` is higher, 1/2 for a tie, 0 where `base` is.

    Example:
        >>> wins(torch.tensor([2.0, 1.0, 0.0]), torch.ones(3))
        tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    return (tuned > base).double() + 0.5 * (tuned == base)


def win_rate(
    prompts: Tensor,
    won: Tensor,
    counted: Tensor | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 9999,
    seed: int = 0,
) -> WinRate:
    """The share of wins, ties counted half, and a percentile bootstrap's interval.

        rate = (wins + ties / 2) / images

    Prompts are drawn again with all their images: the images of one prompt are not independent.

    Args:
        prompts: [N], the number of each image's prompt.
        won: [N], of `wins`.
        counted: [N], bool: the images that both sides have a score of; None for all.
        confidence: of the interval, in (0, 1).
        num_resamples: how often the prompts are drawn.
        seed: the draws are a function of it.

    Example:
        >>> win_rate(torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1.0, 0.5, 0.5]))
        WinRate(rate=0.75, low=0.5, high=1.0)

    Source: Efron and Tibshirani 1993, chapter 13; scipy.stats.bootstrap.
    """
    if counted is not None:
        prompts, won = prompts[counted], won[counted]
    if not len(won):
        return WinRate(*[float("nan")] * 3)
    won = won.double()
    sums, counts = (sum_by_prompt(prompts, values).numpy() for values in (won, torch.ones_like(won)))
    rate = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return WinRate(rate, float("nan"), float("nan"))

    def share(sums: NDArray[np.float64], counts: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        total: NDArray[np.float64] = sums.sum(axis=axis) / counts.sum(axis=axis)
        return total

    interval = bootstrap(
        (sums, counts),
        share,
        paired=True,
        vectorized=True,
        n_resamples=num_resamples,
        batch=RESAMPLES_AT_ONCE,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return WinRate(rate, float(interval.low), float(interval.high))


class WinRates(Metric):
    """`win_rate` of K scores, over batches and devices.

    `update(prompts [N], tuned [N, K], base [N, K], counted [N, K])`, then `compute()`: a `WinRate` for each of the K;
    higher is better.

    Args:
        confidence: see `win_rate`.
        num_resamples: see there.
        seed: see there.
    """

    full_state_update = False
    prompts: list[Tensor]
    won: list[Tensor]
    counted: list[Tensor]

    def __init__(self, confidence: float = 0.95, num_resamples: int = 9999, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.settings: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
        self.add_state("prompts", [], dist_reduce_fx="cat")
        self.add_state("won", [], dist_reduce_fx="cat")
        self.add_state("counted", [], dist_reduce_fx="cat")

    def update(self, prompts: Tensor, tuned: Tensor, base: Tensor, counted: Tensor | None = None) -> None:
        """Adds a batch; one of no images is needed where a device has none."""
        self.prompts.append(prompts.to(self.device))
        self.won.append(wins(tuned, base).float().to(self.device))  # 0, 0.5 and 1: no bit is lost
        counted = torch.ones_like(tuned, dtype=torch.bool) if counted is None else counted
        self.counted.append(counted.to(self.device))

    def compute(self) -> list[WinRate]:
        """Over all images."""
        prompts, won = dim_zero_cat(self.prompts).cpu(), dim_zero_cat(self.won).cpu().double()
        counted = dim_zero_cat(self.counted).cpu()
        return [win_rate(prompts, *column, **self.settings) for column in zip(won.T, counted.T, strict=True)]
