"""A training step's loss, and the drift from the base model, from velocities at a batch's points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.objective import velocity_divergence, velocity_objective
from lightning_fdfo.rollout.points import TrajectoryPoints

PointLoss = Callable[[Tensor, TrajectoryPoints], tuple[Tensor, dict[str, Tensor]]]
"""`objective(velocity [B, ...], batch) -> loss [B], numbers to be logged`"""


def fdfo_loss(velocity: Tensor, batch: TrajectoryPoints, *, clip_range: float) -> tuple[Tensor, dict[str, Tensor]]:
    """FDFO's objective of points, see `velocity_objective`: a `PointLoss`."""
    loss, ratio = velocity_objective(
        velocity, batch.old_velocity, batch.direction, batch.reward_difference, clip_range=clip_range
    )
    clipped = ((ratio - 1).abs() > clip_range).float().mean()
    return loss, {"train/ratio": ratio.mean(), "train/clip_fraction": clipped}


def batch_loss(
    velocity: Tensor,
    batch: TrajectoryPoints,
    objective: PointLoss,
    kl_weight: float,
    base_velocity: Callable[[], Tensor],
) -> tuple[Tensor, dict[str, Any]]:
    """An objective, averaged over a batch, with the penalty for leaving the base model.

    Args:
        velocity: [B, ...], of the model that trains, with its gradient.
        batch: B points.
        objective: of points.
        kl_weight: of mean((v - v_base)^2).
        base_velocity: gives the base model's velocity, [B, ...]; called if `kl_weight` is not 0.

    Returns:
        The loss, and what is logged of it by name.

    Raises:
        ConfigurationError: an objective that gives something else than a loss a point.
    """
    loss, logged = objective(velocity, batch)
    if loss.shape != velocity.shape[:1]:
        raise ConfigurationError(
            f"Algorithm.loss: expected a loss a point, of shape {list(velocity.shape[:1])}, got {list(loss.shape)}"
        )
    mean_loss = (loss if batch.weight is None else loss * batch.weight).mean()
    if kl_weight:
        divergence = velocity_divergence(velocity, base_velocity()).mean()
        mean_loss = mean_loss + kl_weight * divergence
        logged["train/divergence"] = divergence
    return mean_loss, {"train/loss": mean_loss, **logged}


def drift(velocity: Tensor, base_velocity: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
    """How far a velocity has left the base model's, as a share of it: rms(v - v_base) / rms(v_base).

    Args:
        velocity: [B, ...]
        base_velocity: [B, ...]
        all_sum: sums over devices; the identity on one.

    Example:
        >>> drift(torch.ones(1, 4), 2 * torch.ones(1, 4), lambda sums: sums)
        tensor(0.5000)
    """
    left, size = (velocity_divergence(one, base_velocity).sum() for one in (velocity, torch.zeros_like(base_velocity)))
    sums = all_sum(torch.stack([left, size])).double()  # on the CPU: not every device has float64
    return (sums[0] / sums[1]).sqrt().float()
