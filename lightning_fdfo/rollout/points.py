"""Points to train on: which of a pair's are chosen, and how an epoch's are dealt into batches.

    Rollout, directions, reward differences --stratified choice--> TrajectoryPoints, a batch at a time

Legend: P pairs on this device, 2P branches, T steps, B points of a batch, `...` a latent's own axes.
Every function is pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.randomness import Stream, generator
from lightning_fdfo.rollout.pairs import Rollout
from lightning_fdfo.rollout.plan import BatchPlan


class TrajectoryPoints(NamedTuple):
    """A batch of points to train on."""

    latents: Tensor
    """[B, ...]: x at sigma"""
    sigma: Tensor
    """[B]"""
    old_velocity: Tensor
    """[B, ...]: the rollout's velocity there"""
    direction: Tensor
    """[B, ...]"""
    reward_difference: Tensor
    """[B]"""
    conditioning: Conditioning
    """B rows"""

    def first(self) -> TrajectoryPoints:
        """The first point alone."""
        return TrajectoryPoints(
            self.latents[:1],
            self.sigma[:1],
            self.old_velocity[:1],
            self.direction[:1],
            self.reward_difference[:1],
            self.conditioning[[0]],
        )


def choose_points(seed: int, epoch: int, pair: int, num_steps: int, num_points: int) -> Tensor:
    """Which points of a pair are trained on, in the order in which they are dealt out.

    The pair's 2T points, in order of time, are divided into `num_points` equal strata; one is drawn from each; the
    pair's own generator permutes them.

    Args:
        seed: the run's.
        epoch: the current one.
        pair: global pair index.
        num_steps: T.
        num_points: how many; divides 2T.

    Returns:
        int64 [num_points, 2]: branch (0 or 1) and step k (0 … T-1).

    Example:
        >>> chosen = choose_points(seed=0, epoch=0, pair=0, num_steps=4, num_points=4)
        >>> sorted(chosen[:, 1].tolist())
        [0, 1, 2, 3]
    """
    random = generator(Stream.POINTS, seed, epoch, pair)
    size = 2 * num_steps // num_points
    within = torch.randint(size, (num_points,), generator=random)
    chosen = torch.arange(num_points) * size + within
    chosen = chosen[torch.randperm(num_points, generator=random)]
    return torch.stack([chosen % 2, chosen // 2], dim=1)


def deal_points(
    rollout: Rollout,
    directions: Tensor,
    reward_difference: Tensor,
    plan: BatchPlan,
    *,
    seed: int,
    epoch: int,
) -> Iterator[TrajectoryPoints]:
    """The batches of an epoch: each update takes the same number of points from every pair.

    Args:
        rollout: this device's pairs.
        directions: [2P, ...], of each branch, see `normalize_difference`.
        reward_difference: [2P], half differences of the mixture's total.
        plan: the epoch's arithmetic.
        seed: the run's.
        epoch: the current one.
    """
    latents, velocities = rollout.trajectories
    num_steps = velocities.shape[1]
    chosen = torch.stack(
        [choose_points(seed, epoch, pair, num_steps, plan.points_per_pair) for pair in rollout.pairs], dim=1
    )  # [points, P, 2]
    rows = torch.arange(len(rollout.pairs)).expand(chosen.shape[:2]).flatten()
    branches, steps = chosen.flatten(0, 1).unbind(1)
    for start in range(0, len(rows), plan.batch_size):
        batch = slice(start, start + plan.batch_size)
        pair, step = rows[batch], steps[batch]
        row = 2 * pair + branches[batch]
        yield TrajectoryPoints(
            latents[row, step],
            rollout.sigmas[step],
            velocities[row, step],
            directions[row],
            reward_difference[row],
            rollout.conditioning[pair],
        )
