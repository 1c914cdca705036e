"""How different the images of one prompt are from each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_fdfo.evaluation.prompt_mean import sum_by_prompt


class Distances(NamedTuple):
    """Of the images of each prompt from each other."""

    prompts: Tensor
    """[P], their numbers, ascending"""
    distances: Tensor
    """[P], float64, in [0, 2]"""


def diversity(prompts: Tensor, embeddings: Tensor) -> Distances:
    """The mean pairwise cosine distance of a prompt's R images.

        diversity = mean_{i < j} (1 - e_i . e_j) = 1 - (|sum_i e_i|^2 - R) / (R (R - 1))        |e_i| = 1

    Args:
        prompts: [N], the number of each image's prompt.
        embeddings: [N, D], of any length but 0.

    Returns:
        Distances of prompts with at least two images; the others are left out.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [3.0, 0.0]])
        >>> diversity(torch.tensor([0, 0, 1, 1]), embeddings).distances
        tensor([1., 0.], dtype=torch.float64)
    """
    units = F.normalize(embeddings.double(), dim=1)
    counts = sum_by_prompt(prompts, torch.ones(len(prompts), dtype=torch.float64))
    cosines = (sum_by_prompt(prompts, units).square().sum(dim=1) - counts) / (counts * (counts - 1))
    several = counts > 1
    return Distances(torch.unique(prompts)[several], 1 - cosines[several])


class Diversity(Metric):
    """`diversity` over batches and devices: `update(prompts [N], embeddings [N, D])`, then `compute()`.

    The images of a prompt may lie on several devices.
    """

    full_state_update = False
    prompts: list[Tensor]
    embeddings: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("prompts", [], dist_reduce_fx="cat")
        self.add_state("embeddings", [], dist_reduce_fx="cat")

    def update(self, prompts: Tensor, embeddings: Tensor) -> None:
        """Adds a batch; one of no images is needed where a device has none."""
        self.prompts.append(prompts.to(self.device))
        self.embeddings.append(embeddings.to(self.device))

    def compute(self) -> Distances:
        """Over all images, on the CPU."""
        return diversity(dim_zero_cat(self.prompts).cpu(), dim_zero_cat(self.embeddings).cpu())
