"""What a mixture makes of an epoch's pairs: the numbers of all devices, gathered, then weighed.

    scores of this device --gather--> Scored --judge--> EpochScores: what each term adds to each pair's difference

A pair's trajectories stay on the device that made them; a few numbers a pair and term do not.

Legend: P pairs an epoch over all devices, by their global index; rows 2i and 2i+1 are the branches of pair i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.rollout.pairs import Rollout


class Scored(NamedTuple):
    """An epoch's scores, of all devices."""

    scores: dict[str, Tensor]
    """name of a reward -> [2P], float64, unweighted; NaN where it was not to score, or failed"""
    routes: dict[str, Tensor]
    """name of a reward -> [2P], how much it counts for the prompt; NaN where it was not to score"""
    statistics: dict[str, Tensor]
    """name of an image statistic -> [2P]"""
    distance: Tensor
    """[2P]: mean square of the half difference of the final latents"""

    @property
    def whole(self) -> Tensor:
        """[P], bool: pairs of which no reward that was to score a branch has failed."""
        failed = [self.scores[name].isnan() & ~self.routes[name].isnan() for name in self.scores]
        return ~torch.stack(failed).any(dim=0).view(-1, 2).any(dim=1)

    def select(self, rows: Tensor) -> Scored:
        """Some rows; `rows` is [2P], bool."""
        return Scored(
            {name: score[rows] for name, score in self.scores.items()},
            {name: route[rows] for name, route in self.routes.items()},
            {name: value[rows] for name, value in self.statistics.items()},
            self.distance[rows],
        )


class EpochScores(NamedTuple):
    """An epoch's scores, and what follows from them."""

    prompts: list[str]
    """P texts"""
    scored: Scored
    """of all pairs"""
    whole: Tensor
    """[P], bool: pairs that are trained on; the others were dropped"""
    parts: dict[str, Tensor]
    """name of a reward -> [2P], what it adds to the half difference of the total; 0 in dropped pairs"""
    difference: Tensor
    """[2P], half differences of the total: the sum of the parts"""

    @property
    def kept(self) -> Scored:
        """Scores of the pairs that are trained on."""
        return self.scored.select(self.whole.repeat_interleave(2))

    def of_kept(self, values: Tensor) -> Tensor:
        """Rows of [2P] values that are trained on."""
        return values[self.whole.repeat_interleave(2)]


def own_rows(pairs: Sequence[int]) -> Tensor:
    """The rows of some pairs among those of all.

    Example:
        >>> own_rows([2, 3])
        tensor([4, 5, 6, 7])
    """
    return torch.tensor([row for pair in pairs for row in (2 * pair, 2 * pair + 1)])


def gather(
    rollout: Rollout, endpoint_difference: Tensor, num_pairs: int, all_sum: Callable[[Tensor], Tensor]
) -> Scored:
    """The scores of all devices, on each.

    Args:
        rollout: this device's pairs.
        endpoint_difference: their half differences of the final latents.
        num_pairs: P.
        all_sum: sums a tensor of whole numbers over devices; the identity on one.
    """
    distance = endpoint_difference.flatten(1).pow(2).mean(dim=1)
    parts = (rollout.scores, rollout.routes, rollout.statistics)
    own = torch.stack([*(column.double() for part in parts for column in part.values()), distance.double()])
    everywhere = torch.zeros(len(own), 2 * num_pairs, dtype=torch.float64)
    everywhere[:, own_rows(rollout.pairs)] += own  # each row is one device's, to which the others add 0
    # As whole numbers, their bits cross devices that have no float64, and a sum with 0 keeps each of them.
    columns = iter(all_sum(everywhere.view(torch.int64)).view(torch.float64))
    scores = {name: next(columns) for name in rollout.scores}
    to, statistics = ({name: next(columns).float() for name in part} for part in parts[1:])
    return Scored(scores, to, statistics, next(columns).float())


def judge(scored: Scored, prompts: list[str], rewards: RewardMix, epoch: int) -> EpochScores:
    """Brings the scales up to date and weighs; each device must call it alike.

    Args:
        scored: of all pairs; one is whole at least.
        prompts: P texts.
        rewards: the mixture.
        epoch: the current one.
    """
    whole = scored.whole
    rows = whole.repeat_interleave(2)
    kept = scored.select(rows)
    rewards.update_scales(epoch, kept.scores)
    parts = {}
    for name, part in rewards.differences(kept.scores, kept.routes, epoch).items():
        parts[name] = torch.zeros(len(rows))
        parts[name][rows] = part
    return EpochScores(prompts, scored, whole, parts, torch.stack(list(parts.values())).sum(dim=0))
