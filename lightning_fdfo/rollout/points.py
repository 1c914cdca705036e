"""Points to train on: which of a pair's are chosen, where they are kept, and how they are dealt into batches.

    --choose_points, allocate_points--> an empty PairPoints --the sampler's steps--> a full one --deal_points--> batches

Which points train is known before the rollout, so nothing else of a trajectory is kept.

Legend: P pairs on this device, 2P branches, T steps, n points of a pair, B points of a batch, `...` a latent's axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.randomness import Stream, generator
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
    weight: Tensor | None = None
    """[B]: what a point's loss is multiplied by, where an algorithm's is; 0 where the pair was dropped"""

    def pin_memory(self) -> TrajectoryPoints:
        """The same in pinned memory: Lightning's copy to a GPU then makes nobody wait."""
        return TrajectoryPoints(
            self.latents.pin_memory(),
            self.sigma.pin_memory(),
            self.old_velocity.pin_memory(),
            self.direction.pin_memory(),
            self.reward_difference.pin_memory(),
            self.conditioning.pin_memory(),
            None if self.weight is None else self.weight.pin_memory(),
        )

    def first(self) -> TrajectoryPoints:
        """The first point alone."""
        return TrajectoryPoints(
            self.latents[:1],
            self.sigma[:1],
            self.old_velocity[:1],
            self.direction[:1],
            self.reward_difference[:1],
            self.conditioning[[0]],
            None if self.weight is None else self.weight[:1],
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


@dataclass(frozen=True)
class PairPoints:
    """What is kept of some pairs' trajectories. The memory is allocated once, and filled while they are sampled."""

    chosen: Tensor
    """int64 [P, n, 2], on the CPU: branch and step of each point, see `choose_points`"""
    latents: Tensor
    """[P, n, ...], float32: x at the points"""
    velocities: Tensor
    """[P, n, ...], in the dtype of `sampling.store`: the rollout's velocities there"""
    ends: Tensor
    """[2P, ...], float32: the final latents"""

    def __getitem__(self, rows: slice) -> PairPoints:
        """Some of the pairs, by a slice that has both ends: views, through which these are filled."""
        branches = slice(2 * rows.start, 2 * rows.stop)
        return PairPoints(self.chosen[rows], self.latents[rows], self.velocities[rows], self.ends[branches])

    def record(self, step: int, latents: Tensor, velocity: Tensor) -> None:
        """Keeps what is chosen of a step: a `lightning_fdfo.sampling.Record`.

        Example:
            >>> points = allocate_points(range(1), num_steps=2, num_points=4, shape=(1,), seed=0, epoch=0)
            >>> for step in range(2):
            ...     points.record(step, latents=torch.full((2, 1), 10.0 * step), velocity=torch.ones(2, 1))
            >>> torch.equal(points.latents[0, :, 0], 10.0 * points.chosen[0, :, 1])
            True
        """
        pair, point = (self.chosen[..., 1] == step).nonzero(as_tuple=True)
        row = 2 * pair + self.chosen[pair, point, 0]
        self.latents[pair, point] = latents[row]
        self.velocities[pair, point] = velocity[row].to(self.velocities.dtype)

    def on(self, device: torch.device) -> PairPoints:
        """Themselves where they are on the device; else empty ones there, to `take` from."""
        if self.latents.device == device:
            return self
        return PairPoints(self.chosen, *(torch.empty_like(each, device=device) for each in self._tensors))

    def take(self, other: PairPoints) -> None:
        """Copies from another device, which need not wait: numbers are there once later ones of that device are."""
        if other is not self:
            for own, theirs in zip(self._tensors, other._tensors, strict=True):
                own.copy_(theirs, non_blocking=True)

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.latents, self.velocities, self.ends


def allocate_points(
    pairs: Sequence[int],
    num_steps: int,
    num_points: int,
    shape: Sequence[int],
    *,
    seed: int,
    epoch: int,
    store: torch.dtype = torch.float32,
    pinned: bool = False,
) -> PairPoints:
    """Chooses the points of some pairs, and allocates memory for them on the CPU.

    Args:
        pairs: global indices.
        num_steps: T.
        num_points: of each pair; divides 2T.
        shape: of a latent.
        seed: the run's.
        epoch: the current one.
        store: of velocities.
        pinned: whether a GPU may copy to it without waiting.

    Example:
        >>> points = allocate_points(range(3), num_steps=4, num_points=2, shape=(16, 8, 8), seed=0, epoch=0)
        >>> points.latents.shape, points.ends.shape
        (torch.Size([3, 2, 16, 8, 8]), torch.Size([6, 16, 8, 8]))
    """
    chosen = torch.stack([choose_points(seed, epoch, pair, num_steps, num_points) for pair in pairs])
    count = len(pairs)
    return PairPoints(
        chosen,
        torch.empty(count, num_points, *shape, pin_memory=pinned),
        torch.empty(count, num_points, *shape, dtype=store, pin_memory=pinned),
        torch.empty(2 * count, *shape, pin_memory=pinned),
    )


def dealing_order(num_pairs: int, num_points: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The pair and the number of each point, batch by batch: each update takes as many points from every pair.

    Example:
        >>> [(pair.tolist(), number.tolist()) for pair, number in dealing_order(2, 2, 2)]
        [([0, 1], [0, 0]), ([0, 1], [1, 1])]
    """
    pairs = torch.arange(num_pairs).repeat(num_points)
    numbers = torch.arange(num_points).repeat_interleave(num_pairs)
    for start in range(0, len(pairs), batch_size):
        batch = slice(start, start + batch_size)
        yield pairs[batch], numbers[batch]


def deal_points(
    points: PairPoints,
    sigmas: Tensor,
    conditioning: Conditioning,
    directions: Tensor,
    reward_difference: Tensor,
    plan: BatchPlan,
) -> Iterator[TrajectoryPoints]:
    """The batches of an epoch, see `dealing_order`.

    Args:
        points: of this device's pairs.
        sigmas: [T+1]
        conditioning: P rows.
        directions: [2P, ...], of each branch, see `normalize_difference`.
        reward_difference: [2P], half differences of the mixture's total.
        plan: the epoch's arithmetic.
    """
    for pair, number in dealing_order(len(points.chosen), plan.points_per_pair, plan.batch_size):
        branch, step = points.chosen[pair, number].unbind(1)
        row = 2 * pair + branch
        yield TrajectoryPoints(
            points.latents[pair, number],
            sigmas[step],
            points.velocities[pair, number].float(),
            directions[row],
            reward_difference[row],
            conditioning[pair],
        )
