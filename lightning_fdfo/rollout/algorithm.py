"""Algorithm: another way to learn from rollouts than FDFO's, by a class that a configuration names.

    rollout, totals --Algorithm.targets--> Targets --dealt into batches--> TrajectoryPoints --Algorithm.loss--> gradient

Sampling, rewards, updates, precision, devices, checkpoints and logs are the package's own.

Legend: P pairs on this device, 2P branches (rows 2i and 2i+1 are pair i), n points of a pair, `...` a latent's axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.rollout.pairs import Rollout
from lightning_fdfo.rollout.plan import BatchPlan
from lightning_fdfo.rollout.points import PairPoints, TrajectoryPoints, dealing_order
from lightning_fdfo.settings import Sampling

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`velocity(latents [N, ...], sigma [N], pairs [N]) -> [N, ...]`, of the rollout's weights, for this device's pairs"""


class Targets(NamedTuple):
    """What each point of this device's pairs is to learn; they need not lie on the trajectories."""

    latents: Tensor
    """[P, n, ...]: x at sigma"""
    sigma: Tensor
    """[P, n]"""
    velocity: Tensor
    """[P, n, ...]: the rollout's there; `batch.old_velocity` of the loss"""
    direction: Tensor
    """[P, n, ...]: `batch.direction` of the loss: whatever that needs of the latents' shape"""
    advantage: Tensor
    """[P, n]: `batch.reward_difference` of the loss"""


def deal_targets(
    targets: Targets, kept: Tensor, conditioning: Conditioning, plan: BatchPlan
) -> Iterator[TrajectoryPoints]:
    """The batches of an epoch, see `dealing_order`.

    Args:
        targets: of this device's pairs.
        kept: [P], what the losses of a pair are multiplied by; 0 for one that was dropped.
        conditioning: P rows.
        plan: the epoch's arithmetic.
    """
    for pair, number in dealing_order(plan.pairs_per_device, plan.points_per_pair, plan.batch_size):
        latents, sigma, velocity, direction, advantage = (each[pair, number] for each in targets)
        yield TrajectoryPoints(latents, sigma, velocity, direction, advantage, conditioning[pair], kept[pair])


def check_targets(name: str, targets: Targets, points: PairPoints) -> None:
    """Raises ConfigurationError, by the class's name, for targets of other shapes than the points of a rollout."""
    if not isinstance(targets, Targets):
        raise ConfigurationError(f"{name}.targets: expected Targets, got {type(targets).__name__}")
    expected = {"sigma": points.latents.shape[:2], "advantage": points.latents.shape[:2]}
    for key, value in targets._asdict().items():
        shape = expected.get(key, points.latents.shape)
        if not isinstance(value, Tensor) or value.shape != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigurationError(f"{name}.targets: expected {key} of shape {list(shape)}, got {got}")


class Context(NamedTuple):
    """What an algorithm may ask of the run."""

    totals: Tensor
    """[2Q] of the Q pairs of all devices: the mixture's totals"""
    kept: Tensor
    """[2Q], bool: images of pairs that train; the totals of others, which a reward failed on, say nothing"""
    prompts: list[str]
    """Q texts"""
    rows: Tensor
    """[2P]: which of the totals are this device's"""
    velocity: Velocity
    sampling: Sampling
    """how the pairs were sampled"""
    seed: int
    """the run's"""
    epoch: int
    """the current one"""


class Algorithm(ABC):
    """How a run learns from its rollouts, where `model.algorithm` names one; without one it is FDFO.

    A pair's two images can be made independent, `sampling: {churn: 0, initial_churn: 1e9}`, and a prompt can have
    several pairs, `batching.pairs_per_prompt`: with k of them a group of 2k images. `objective.kl_weight`, `kl_target`
    and `trust_region` work as ever. The rest of `objective`, and `clip`, `gate` and `gradient` of a reward's term, are
    FDFO's: `normalization` and `clip_range` have no effect, the others are refused.
    """

    @abstractmethod
    def targets(self, rollout: Rollout, context: Context) -> Targets:
        """What the points of this device's pairs are to learn; called once an epoch, with the rollout's weights.

        Args:
            rollout: this device's pairs; `rollout.points` are n points of each, on the trajectories, and the final
                latents.
            context: of the run.
        """

    @abstractmethod
    def loss(self, velocity: Tensor, batch: TrajectoryPoints) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some points.

        Args:
            velocity: [B, ...], of the weights that train, with their gradient.
            batch: B points, as `targets` gave them.

        Returns:
            The loss, [B], float32; and numbers to be logged, by name, such as `train/ratio`.
        """


def group_advantages(context: Context, *, eps: float = 1e-4) -> Tensor:
    """How much better an image is than others of its prompt: (total - mean) / (std + eps), over the prompt's images.

    The pairs of a text are a group. Images of pairs that were dropped are in none of the sums, and get 0.

    Args:
        context: of the run: its totals, prompts and kept pairs.
        eps: > 0; a group of equal totals gets 0.

    Returns:
        [2Q], float32.

    Example:
        >>> totals, kept = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.ones(4, dtype=torch.bool)
        >>> context = Context(totals, kept, ["a cat", "the dog"], torch.arange(4), lambda *_: totals, Sampling(), 0, 0)
        >>> group_advantages(context, eps=1e-9)
        tensor([-1.,  1.,  0.,  0.])

    Source: Shao et al. 2024 (arXiv 2402.03300), eq. 3 of section 4.1.
    """
    numbers = {text: number for number, text in enumerate(dict.fromkeys(context.prompts))}
    group = torch.tensor([numbers[text] for text in context.prompts]).repeat_interleave(2)
    kept, totals = context.kept.double(), context.totals.double()
    nothing = torch.zeros(len(numbers), dtype=torch.float64)
    count = nothing.index_add(0, group, kept).clamp(min=1)
    mean = nothing.index_add(0, group, kept * totals) / count
    centred = kept * (totals - mean[group])
    std = (nothing.index_add(0, group, centred**2) / count).sqrt()
    return (centred / (std[group] + eps)).float()
