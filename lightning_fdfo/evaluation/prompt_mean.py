"""Means over images of which each prompt has several, and their uncertainty."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Mean(NamedTuple):
    """Means of K numbers."""

    mean: Tensor
    """[K], float64; NaN where there is no value"""
    standard_error: Tensor
    """[K], float64; NaN with fewer than two prompts"""


def prompt_mean(prompts: Tensor, values: Tensor, counted: Tensor | None = None) -> Mean:
    """The mean over images, and its standard error, where the images of one prompt are not independent.

        mean           = sum_i y_i / N
        standard_error = sqrt(P / (P - 1) * sum_p (sum_{i of p} (y_i - mean))^2) / N

    With as many images of each prompt, that is the standard error of the mean of the prompts' means.

    Args:
        prompts: [N], the number of each image's prompt.
        values: [N, K].
        counted: [N, K], bool: the values that there are; None for all.

    Example:
        >>> prompts, values = torch.tensor([0, 0, 1, 1]), torch.tensor([[1.0], [1.0], [2.0], [2.0]])
        >>> prompt_mean(prompts, values)
        Mean(mean=tensor([1.5000], dtype=torch.float64), standard_error=tensor([0.5000], dtype=torch.float64))

    Source: the cluster-robust variance of a mean (Liang and Zeger 1986), with its correction for few clusters.
    """
    counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
    given = torch.where(counted, values.double(), 0.0)
    mean = given.sum(dim=0) / counted.sum(dim=0).double()
    left = torch.where(counted, given - mean, 0.0)
    sums, counts = sum_by_prompt(prompts, left), sum_by_prompt(prompts, counted.double())
    clusters = (counts > 0).sum(dim=0).double()
    spread = sums.square().sum(dim=0)
    return Mean(mean, (clusters / (clusters - 1) * spread).sqrt() / counted.sum(dim=0).double())


def sum_by_prompt(prompts: Tensor, values: Tensor) -> Tensor:
    """Sums of values [N, ...] over the images of each prompt: [P, ...], in the order of the prompts' numbers.

    Example:
        >>> sum_by_prompt(torch.tensor([7, 3, 7]), torch.tensor([1.0, 10.0, 2.0]))
        tensor([10.,  3.])
    """
    numbers, rows = torch.unique(prompts, return_inverse=True)
    return values.new_zeros(len(numbers), *values.shape[1:]).index_add_(0, rows, values)


class PromptMean(Metric):
    """`prompt_mean` over batches and devices: `update(prompts [N], values [N, K], counted [N, K])`, then `compute()`.

    Values are float64, and wait on the device as integers of the same bits: not every device has float64.
    """

    full_state_update = False
    prompts: list[Tensor]
    values: list[Tensor]
    counted: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("prompts", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("counted", [], dist_reduce_fx="cat")

    def update(self, prompts: Tensor, values: Tensor, counted: Tensor | None = None) -> None:
        """Adds a batch; one of no images is needed where a device has none."""
        self.prompts.append(prompts.to(self.device))
        self.values.append(values.cpu().double().view(torch.int64).to(self.device))
        counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
        self.counted.append(counted.to(self.device))

    def compute(self) -> Mean:
        """Over all images, on the CPU."""
        values = dim_zero_cat(self.values).cpu().view(torch.float64)
        return prompt_mean(dim_zero_cat(self.prompts).cpu(), values, dim_zero_cat(self.counted).cpu())
