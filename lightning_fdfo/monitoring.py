"""Numbers that say how a rollout went, over all devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import torch
from torch import Tensor

from lightning_fdfo.objective import half_differences
from lightning_fdfo.reward_mix import RewardMix
from lightning_fdfo.rollout import Rollout

Key = tuple[str, ...]


def rollout_metrics(rollout: Rollout, rewards: RewardMix, all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Means and deviations of an epoch's rewards and pairs.

    For the total, as `reward`, and for each term, as `reward/NAME`:

    - `/mean`, `/std` of the scores;
    - `/difference`: mean |half difference| of a pair;
    - `/ties`: share of pairs with equal scores.

    For each term with a weight, `reward/NAME/share` of the total's differences,

        share_t = sum_i sign(total_i) * difference_ti / sum_i |total_i|        total_i = sum_t difference_ti

    Shares sum to 1; a term that is mostly outvoted has a negative one. Left out if no pair differs.

    For two terms, `reward/A/agrees_with/B`: share of pairs of which both prefer the same branch, among those that are a
    tie for neither. Left out if there are none.

    For each of `evaluation.image_statistics`, `image/NAME`: its mean over all images.

    And `rollout/pair_distance` (rms of the half difference of the final latents), `rollout/images_per_second`.

    Args:
        rollout: this device's pairs.
        rewards: the mixture that scored it, its scales up to date.
        all_sum: sums a tensor over devices; the identity on one.
    """
    sums = dict(_sums(rollout, rewards))
    over_devices = all_sum(torch.stack([value.double() for value in sums.values()])).tolist()
    total = dict(zip(sums, over_devices, strict=True))
    count = total["images",]
    metrics = {
        "rollout/pair_distance": (total["distance",] / count) ** 0.5,
        "rollout/images_per_second": count / rollout.seconds,
    }
    for name, what in [key for key in total if len(key) == 2]:
        value = total[name, what]
        if what == "mean":
            mean, mean_square = value / count, total[name, "square"] / count
            metrics |= {f"{name}/mean": mean, f"{name}/std": max(mean_square - mean**2, 0.0) ** 0.5}
        elif what == "average":
            metrics[name] = value / count
        elif what in ("difference", "ties"):
            metrics[f"{name}/{what}"] = value / count
        elif what == "share" and total["reward", "difference"]:
            metrics[f"{name}/share"] = value / total["reward", "difference"]
    for first, second, _ in [key for key in total if key[-1] == "decided" and total[key]]:
        agreed = total[first, second, "agreed"] / total[first, second, "decided"]
        metrics[f"reward/{first}/agrees_with/{second}"] = agreed
    return metrics


def _sums(rollout: Rollout, rewards: RewardMix) -> Iterator[tuple[Key, Tensor]]:
    """Sums over this device's images from which all of the above follows."""
    scores = rollout.scores
    distance = half_differences(rollout.trajectories.latents[:, -1]).flatten(1).pow(2).mean(dim=1)
    yield ("images",), torch.tensor(float(len(distance)))
    yield ("distance",), distance.sum()
    parts = rewards.differences(scores)
    difference = torch.stack(list(parts.values())).sum(dim=0)
    yield from _sums_of_one("reward", rewards.total(scores), difference)
    for name, statistic in rollout.statistics.items():
        yield (f"image/{name}", "average"), statistic.double().sum()
    for name, score in scores.items():
        yield from _sums_of_one(f"reward/{name}", score, half_differences(score))
        if rewards.terms[name].weight:
            yield (f"reward/{name}", "share"), (difference.sign() * parts[name]).sum()
    for first, second in combinations(scores, 2):
        votes = rewards.preference(first, scores) * rewards.preference(second, scores)
        yield (first, second, "agreed"), (votes > 0).sum()
        yield (first, second, "decided"), (votes != 0).sum()


def _sums_of_one(name: str, score: Tensor, difference: Tensor) -> Iterator[tuple[Key, Tensor]]:
    yield (name, "mean"), score.double().sum()
    yield (name, "square"), score.double().pow(2).sum()
    yield (name, "difference"), difference.double().abs().sum()
    yield (name, "ties"), (difference == 0).sum()
