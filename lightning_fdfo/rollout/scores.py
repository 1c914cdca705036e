"""The scores of an epoch's pairs: gathered from all devices, then weighted by the mixture.

    scores of this device --gather--> GatheredScores --weigh--> EpochScores: what each term adds to a pair's difference

A pair's trajectories stay on the device that made them; a few numbers a pair and term do not.

Legend: P pairs per epoch over all devices, by their global index; rows 2i and 2i+1 are the branches of pair i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.scores import HalfDifferences, Scores, compare, kept_pairs
from lightning_fdfo.rollout.pairs import Rollout


class GatheredScores(NamedTuple):
    """An epoch's scores, of all devices."""

    scores: dict[str, Scores]
    """name of a reward -> its scores of 2P images"""
    statistics: dict[str, Tensor]
    """name of an image statistic -> [2P]"""
    distance: Tensor
    """[2P]: mean square of the half difference of the final latents"""


class EpochScores(NamedTuple):
    """An epoch's scores, of all devices, and what follows from them.

    A pair is dropped if a reward that was to score it has failed: it does not train, and is in no number.
    """

    prompts: list[str]
    """P texts"""
    scores: dict[str, Scores]
    """name of a reward -> its scores of 2P images, dropped ones too"""
    statistics: dict[str, Tensor]
    """name of an image statistic -> [2P]"""
    distance: Tensor
    """[2P]: mean square of the half difference of the final latents"""
    kept: Tensor
    """[P], bool: pairs that are trained on; the others were dropped"""
    differences: dict[str, HalfDifferences]
    """name of a reward -> half differences of its scores, in its own units"""
    contributions: dict[str, Tensor]
    """name of a reward -> [2P], what it adds to the half difference of the total; 0 in dropped pairs"""
    difference: Tensor
    """[2P], half differences of the total: the sum of the contributions. They train as `Adaptation.scale` has them"""

    @property
    def kept_rows(self) -> Tensor:
        """[2P], bool: branches of pairs that are trained on."""
        return self.kept.repeat_interleave(2)


def own_rows(pairs: Sequence[int]) -> Tensor:
    """The rows of some pairs among those of all.

    Example:
        >>> own_rows([2, 3])
        tensor([4, 5, 6, 7])
    """
    return torch.tensor([row for pair in pairs for row in (2 * pair, 2 * pair + 1)])


def gather(
    rollout: Rollout, endpoint_difference: Tensor, num_pairs: int, all_sum: Callable[[Tensor], Tensor]
) -> GatheredScores:
    """The scores of all devices, on each.

    Args:
        rollout: this device's pairs.
        endpoint_difference: their half differences of the final latents.
        num_pairs: P.
        all_sum: sums a tensor of integers over devices; the identity on one.
    """
    distance = endpoint_difference.flatten(1).pow(2).mean(dim=1)
    columns = [*(column for one in rollout.scores.values() for column in one), *rollout.statistics.values(), distance]
    own = torch.stack([column.double() for column in columns])
    everywhere = torch.zeros(len(own), 2 * num_pairs, dtype=torch.float64)
    everywhere[:, own_rows(rollout.pairs)] += own  # each row is one device's, to which the others add 0
    # As integers, their bits cross devices that have no float64, and a sum with 0 keeps each of them.
    summed = all_sum(everywhere.view(torch.int64)).view(torch.float64)
    gathered = iter([values.to(column.dtype) for values, column in zip(summed, columns, strict=True)])
    return GatheredScores(
        {name: Scores(*(next(gathered) for _ in Scores._fields)) for name in rollout.scores},
        {name: next(gathered) for name in rollout.statistics},
        next(gathered),
    )


def weigh(gathered: GatheredScores, prompts: list[str], rewards: RewardMix, epoch: int) -> EpochScores:
    """Brings the mixture's scales up to date, and weighs; each device must call it alike.

    Args:
        gathered: of all pairs; one is kept at least.
        prompts: P texts.
        rewards: the mixture.
        epoch: the current one.
    """
    differences = compare(gathered.scores)
    rewards.update_scales(epoch, differences)
    contributions = rewards.contributions(gathered.scores, differences, epoch)
    total = torch.stack(list(contributions.values())).sum(dim=0)
    return EpochScores(prompts, *gathered, kept_pairs(gathered.scores), differences, contributions, total)
