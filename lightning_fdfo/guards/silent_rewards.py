"""Reports rewards that teach nothing, or little, in an epoch, and why.

A pair teaches by the difference of its two scores. Where all differences are 0 (constant scores, a gate that is shut,
equal images) the gradient is 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.rollout.scores import EpochScores

MANY_TIES = 0.5
"""Share of a reward's pairs above which ties are reported."""
FEW_VALUES = 0.1
"""Different scores per image at or below which scores count as rounded."""


def nothing_learned(scores: EpochScores, rewards: RewardMix, epoch: int) -> Iterator[tuple[str, str]]:
    """What teaches nothing, or little, in an epoch, and why that may be.

    Args:
        scores: of the epoch's pairs, over all devices.
        rewards: the mixture.
        epoch: the current one.

    Yields:
        A key, so that each thing is reported once (a reward's name; empty for the mixture), and a sentence.
    """
    weighted = [name for name, term in rewards.terms.items() if term.weight_at(epoch)]
    if not scores.difference.any() and not rewards.gradient_terms(epoch):
        equal = not scores.distance[scores.kept_rows].any()
        why = "the two images of each pair are equal: raise sampling.churn" if equal else None
        why = why or ("no reward has a weight" if not weighted else "no reward tells the images of a pair apart")
        pairs = int(scores.kept.sum())
        yield "", f"none of the {pairs} pairs of epoch {epoch} has a difference, so that nothing trains in it: {why}"
    for name in weighted:
        if rewards.terms[name].gradient:  # it needs no difference
            continue
        if sentence := _ties(name, scores, rewards):
            yield name, sentence


def _ties(name: str, epoch_scores: EpochScores, rewards: RewardMix) -> str | None:
    """A sentence about a term that teaches nothing, or little; None if it does."""
    differences, compared = epoch_scores.differences[name]
    if not compared.any():
        return f"reward {name}: no prompt of the epoch names it in its rewards, so that it teaches nothing"
    passing = rewards.passes(name, epoch_scores.scores)
    gate = rewards.terms[name].gate
    if gate is not None and not (passing & compared).any():
        other = epoch_scores.scores[gate.reward]
        others = other.values[other.scored & epoch_scores.kept_rows]
        span = f"{others.min().item():.4g} to {others.max().item():.4g}" if len(others) else "none"
        return (
            f"reward {name}: its gate ({gate.reward} above {gate.above:g}, below {gate.below:g}) lets no pair pass, so "
            f"that it teaches nothing until it opens; {gate.reward} scored {span}"
        )
    ties = differences[compared] == 0
    share = ties.double().mean().item()
    if share <= MANY_TIES:
        return None
    found = f"{int(ties.sum()) // 2} of {len(ties) // 2} pairs score alike, and teach nothing"
    if name in rewards.pair_terms:
        return f"reward {name}: {int(ties.sum()) // 2} of {len(ties) // 2} pairs are a tie to it, and teach nothing"
    cause = _cause(epoch_scores.scores[name].values[compared], epoch_scores.distance[compared], ties)
    return f"reward {name}: {found}: {cause}"


def _cause(scores: Tensor, distance: Tensor, ties: Tensor) -> str:
    """Why scores tie."""
    values = torch.unique(scores)
    if not distance[ties].any():
        return "the two images of these pairs are equal: raise sampling.churn"
    if len(values) == 1:
        return f"the score is constant, {values[0].item():.4g} for every image"
    if len(values) <= max(2.0, FEW_VALUES * len(scores)):
        return f"the scores take {len(values)} different values: they are rounded, or a yes or no; use a smoother score"
    return "the images of a pair are too alike for this reward: raise sampling.churn, or use a smoother score"
