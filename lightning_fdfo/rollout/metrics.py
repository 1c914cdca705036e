"""The logged numbers of a rollout, over all devices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.rollout.scores import EpochScores

Metric = tuple[str, float]


def rollout_metrics(scores: EpochScores, rewards: RewardMix, epoch: int) -> dict[str, float]:
    """Means and deviations of an epoch's rewards and pairs; dropped pairs are in none of them.

    For the total, as `reward`, and for each term, as `reward/NAME`, over the images and pairs that it has scored (left
    out if there are none):

    - `/mean`, `/std` of the scores; not of a `PairReward`, which has none of an image by itself;
    - `/difference`: mean |half difference| of a pair: of a term, in its own units;
    - `/ties`: share of pairs with equal scores; of the total, with a difference of 0;
    - `/gated`, for a term with a gate: share of pairs that pass it.

    For each term with a weight, `reward/NAME/share` of the total's differences,

        share_t = sum_i sign(total_i) * difference_ti / sum_i |total_i|        total_i = sum_t difference_ti

    Shares sum to 1; a term that is mostly outvoted has a negative one. Left out if no pair differs, and for terms that
    train by their gradient.

    For two terms, over pairs that both have scored:

    - `reward/A/agrees_with/B`: share of pairs of which both prefer the same branch, among those that are a tie for
      neither. Left out if there are none.
    - `reward/A/rank_correlation/B`: Spearman's, of their half differences, in [-1, 1]. Each pair is in it twice, once
      from each branch, so that it does not matter which comes first. Left out for less than two pairs, and if all are
      a tie for one.

    For each of `image_statistics`, `image/NAME`: its mean over all images.

    And `rollout/pair_distance`: rms of the half difference of the final latents.

    Args:
        scores: of the epoch's pairs.
        rewards: the mixture that made it.
        epoch: the current one.
    """
    rows = scores.kept_rows
    total = rewards.total({name: one.select(rows) for name, one in scores.scores.items()}, epoch).values
    difference, distance = scores.difference[rows], scores.distance[rows]
    metrics = {"rollout/pair_distance": (distance.sum().item() / len(distance)) ** 0.5}
    metrics |= {f"image/{name}": values[rows].double().mean().item() for name, values in scores.statistics.items()}
    metrics |= dict(_of_one("reward", total, difference))
    size = difference.double().abs().sum()
    for name, (values, compared) in scores.differences.items():
        if not compared.any():
            continue
        own = dict(_of_one(f"reward/{name}", scores.scores[name].values[compared], values[compared]))
        of_images = {f"reward/{name}/mean", f"reward/{name}/std"} if name in rewards.pair_terms else set()
        metrics |= {key: value for key, value in own.items() if key not in of_images}
        if rewards.terms[name].weight_at(epoch) and size and not rewards.terms[name].gradient:
            added = scores.contributions[name][rows]
            metrics[f"reward/{name}/share"] = ((difference.sign() * added).sum().double() / size).item()
        if rewards.terms[name].gate is not None:
            metrics[f"reward/{name}/gated"] = rewards.passes(name, scores.scores)[compared].double().mean().item()
    for first, second in combinations(scores.differences, 2):
        both = scores.differences[first].compared & scores.differences[second].compared
        ours, theirs = (rewards.preference(name, scores.differences)[both] for name in (first, second))
        metrics |= dict(_of_two(first, second, ours, theirs))
    return metrics


def _of_one(name: str, score: Tensor, difference: Tensor) -> Iterator[Metric]:
    """Scores, [2P], and half differences."""
    count = len(score)
    mean, mean_square = score.double().sum().item() / count, score.double().pow(2).sum().item() / count
    yield f"{name}/mean", mean
    yield f"{name}/std", max(mean_square - mean**2, 0.0) ** 0.5
    yield f"{name}/difference", difference.double().abs().sum().item() / count
    yield f"{name}/ties", int((difference == 0).sum()) / count


def _of_two(first: str, second: str, ours: Tensor, theirs: Tensor) -> Iterator[Metric]:
    """Half differences of pairs that both terms have scored, positive where a term prefers the row."""
    votes = ours.sign() * theirs.sign()
    if votes.any():
        yield f"reward/{first}/agrees_with/{second}", int((votes > 0).sum()) / int((votes != 0).sum())
    if len(ours) > 2 and ours.any() and theirs.any():
        correlation = spearman_corrcoef(ours.double(), theirs.double())
        yield f"reward/{first}/rank_correlation/{second}", correlation.item()
