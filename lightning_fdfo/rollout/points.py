"""The training loader: an epoch's rollout, dealt out as batches of points.

    Rollout --finite differences, stratified choice--> TrajectoryPoints, a batch at a time

Legend: P pairs on this device, 2P branches, T steps, B points of a batch, `...` a latent's own axes.
Nothing here keeps state between epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.flows.base import Conditioning
from lightning_fdfo.objective import Normalization, direction, half_differences
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.randomness import Stream, generator, prompt_rows
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

    The pair's 2T points, in order of time, are cut into `num_points` equal strata; one is drawn from each; the
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
    reward_difference: Tensor,
    plan: BatchPlan,
    *,
    seed: int,
    epoch: int,
    normalization: Normalization,
) -> Iterator[TrajectoryPoints]:
    """The batches of an epoch: each update takes the same number of points from every pair.

    Args:
        rollout: this device's pairs.
        reward_difference: [2P], half differences of the mixture's total.
        plan: the epoch's arithmetic.
        seed: the run's.
        epoch: the current one.
        normalization: of the direction.
    """
    latents, velocities = rollout.trajectories
    directions = direction(half_differences(latents[:, -1]), normalization)
    num_steps = velocities.shape[1]
    chosen = torch.stack(
        [choose_points(seed, epoch, pair, num_steps, plan.points_per_pair) for pair in rollout.pairs], dim=1
    )  # [points, P, 2]
    rows = torch.arange(len(rollout.pairs)).expand(chosen.shape[:2]).flatten()
    branches, steps = chosen.flatten(0, 1).unbind(1)
    for start in range(0, len(rows), plan.batch_size):
        part = slice(start, start + plan.batch_size)
        pair, step = rows[part], steps[part]
        row = 2 * pair + branches[part]
        yield TrajectoryPoints(
            latents[row, step],
            rollout.sigmas[step],
            velocities[row, step],
            directions[row],
            reward_difference[row],
            rollout.conditioning[pair],
        )


class RolloutLoader:
    """A sized iterable: each `iter()` rolls an epoch out, then yields its batches.

    Lightning takes it for a plain training loader, so accumulation, precision and resuming are Lightning's own.

    Args:
        encode: `encode(prompts) -> Conditioning`, called once an epoch, before the first pair is rolled out.
        roll_out: `roll_out(prompts, conditioning, pairs) -> Rollout` for the current epoch.
        judge: `judge(rollout) -> [2P]`: half differences of the total, called once the whole epoch has been rolled out.
        prompts: the training prompts.
        plan: the epoch's arithmetic.
        seed: the run's.
        normalization: of the direction.
        rank: this device's number; it takes pairs rank * P … (rank + 1) * P - 1.
        chunk_size: pairs that are rolled out at once.
        epoch: `epoch() -> int`, the current one.
        track: wraps the iterator over chunks, for a progress bar.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Prompt]], Conditioning],
        roll_out: Callable[[Sequence[Prompt], Conditioning, Sequence[int]], Rollout],
        judge: Callable[[Rollout], Tensor],
        prompts: Sequence[Prompt],
        plan: BatchPlan,
        *,
        seed: int,
        normalization: Normalization,
        rank: int,
        chunk_size: int,
        epoch: Callable[[], int],
        track: Callable[[Sequence[range]], Iterator[range]] = iter,
    ) -> None:
        self.encode = encode
        self.roll_out = roll_out
        self.judge = judge
        self.prompts = prompts
        self.plan = plan
        self.seed = seed
        self.normalization = normalization
        self.rank = rank
        self.chunk_size = chunk_size
        self.epoch = epoch
        self.track = track

    def __len__(self) -> int:
        return self.plan.batches_per_epoch

    def __iter__(self) -> Iterator[TrajectoryPoints]:
        epoch = self.epoch()
        first = self.rank * self.plan.pairs_per_device
        pairs = range(first, first + self.plan.pairs_per_device)
        chunks = [pairs[start : start + self.chunk_size] for start in range(0, len(pairs), self.chunk_size)]
        prompts = self.prompts_of(epoch, pairs)
        conditioning = self.encode(prompts)
        rollout = Rollout.cat([self._chunk(chunk, prompts, conditioning, first) for chunk in self.track(chunks)])
        yield from deal_points(
            rollout,
            self.judge(rollout),
            self.plan,
            seed=self.seed,
            epoch=epoch,
            normalization=self.normalization,
        )

    def prompts_of(self, epoch: int, pairs: range) -> list[Prompt]:
        """The prompts of some of an epoch's pairs, by their global indices."""
        rows = prompt_rows(self.seed, epoch * self.plan.num_pairs + pairs.start, len(pairs), len(self.prompts))
        return [self.prompts[row] for row in rows]

    def _chunk(self, chunk: range, prompts: Sequence[Prompt], conditioning: Conditioning, first: int) -> Rollout:
        rows = range(chunk.start - first, chunk.stop - first)
        return self.roll_out(prompts[rows.start : rows.stop], conditioning[rows], chunk)
