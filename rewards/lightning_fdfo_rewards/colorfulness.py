"""Colourfulness: how vivid an image's colours are. It needs no model, and is easy to check by eye."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fdfo.reward import Metadata, Reward


class Colorfulness(Reward):
    """sqrt(std(rg)^2 + std(yb)^2) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2), of channels from 0 to 255.

        rg = red - green        yb = (red + green) / 2 - blue

    0 is grey; the authors' viewers called 33 moderately and 82 quite colourful, 109 and more extremely.

    Example:
        >>> Colorfulness()(torch.full((1, 3, 8, 8), 0.5), ["grey"], [{}])
        tensor([0.])

    Source: Hasler and Suesstrunk 2003, Measuring colourfulness in natural images.
    """

    range = (0.0, 512.0)
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores a batch; see `Reward.__call__`."""
        red, green, blue = (255 * images.float()).flatten(2).unbind(dim=1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue])
        spread = opponents.std(dim=-1, correction=0).norm(dim=0)
        score: Tensor = spread + 0.3 * opponents.mean(dim=-1).norm(dim=0)
        return score
