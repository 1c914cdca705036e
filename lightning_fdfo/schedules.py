"""Grids of noise levels and of churn.

A grid is a float32 tensor `sigmas` [T+1] that falls from 1 to 0; a churn schedule is a float32 tensor [T+1] whose
entry 0 belongs to the initial latents and whose entry k belongs to the step that lands on sigmas[k].

Left out: a model's own grid. `FlowModel.sigmas` takes that from the model's scheduler.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_sigmas(num_steps: int, *, shift: float = 1.0) -> Tensor:
    """A uniform grid, pushed toward the noise by `shift`.

        sigma -> shift * sigma / (1 + (shift - 1) * sigma)

    Args:
        num_steps: T >= 1.
        shift: > 0; 1 leaves the grid uniform, 3 is what SD3 uses at a megapixel.

    Returns:
        float32 [T+1], from 1 to 0.

    Raises:
        ValueError: num_steps < 1 or shift <= 0.

    Example:
        >>> uniform_sigmas(4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
        >>> uniform_sigmas(4, shift=3.0)
        tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000])

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"expected num_steps >= 1 and shift > 0, got num_steps={num_steps}, shift={shift}")
    sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * sigmas / (1 + (shift - 1) * sigmas)).float()


def churn_schedule(churn: float, num_steps: int, *, initial_churn: float | None = None) -> Tensor:
    """The same churn at every step, and its own at the start.

    Args:
        churn: >= 0, at every step.
        num_steps: T >= 1.
        initial_churn: >= 0, for the initial latents; None means `churn`.

    Returns:
        float32 [T+1]. Entry T is 0: the step that lands on sigma = 0 has no noise left to replace.

    Raises:
        ValueError: a negative churn or num_steps < 1.

    Example:
        >>> churn_schedule(0.5, 3, initial_churn=0.25)
        tensor([0.2500, 0.5000, 0.5000, 0.0000])
    """
    initial = churn if initial_churn is None else initial_churn
    if num_steps < 1 or churn < 0 or initial < 0:
        raise ValueError(f"expected num_steps >= 1 and churn >= 0, got {num_steps=}, {churn=}, {initial_churn=}")
    return torch.tensor([initial, *[churn] * (num_steps - 1), 0.0], dtype=torch.float32)


def check_sigmas(sigmas: Tensor) -> None:
    """Raises ValueError unless `sigmas` is a grid [T+1] that falls strictly from 1 to 0.

    Example:
        >>> check_sigmas(uniform_sigmas(3))
        >>> check_sigmas(torch.tensor([1.0, 0.5]))
        Traceback (most recent call last):
        ...
        ValueError: expected sigmas [T+1] that fall strictly from 1 to 0, got [1.0, 0.5]
    """
    falls = sigmas.ndim == 1 and len(sigmas) > 1 and bool((sigmas.diff() < 0).all())
    if not falls or sigmas[0] != 1 or sigmas[-1] != 0:
        raise ValueError(f"expected sigmas [T+1] that fall strictly from 1 to 0, got {sigmas.tolist()}")
