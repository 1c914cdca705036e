"""Numbers that say how a rollout went, over all devices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_fdfo.objective import half_differences
from lightning_fdfo.rollout import Rollout


def rollout_metrics(rollout: Rollout, all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Means and deviations of an epoch's rewards and pairs.

    Args:
        rollout: this device's pairs.
        all_sum: sums a tensor over devices; the identity on one.

    Returns:
        `reward/mean`, `reward/std`, `reward/difference` (mean |half difference|), `reward/ties` (share of pairs with
        equal totals), `reward/NAME/mean`, `reward/NAME/std`, `rollout/pair_distance` (rms of the half difference of the
        final latents), `rollout/images_per_second`.
    """
    metrics = {}
    num_images = all_sum(torch.tensor([float(len(rollout.scores.total))], dtype=torch.float64)).item()
    for name, scores in {"reward": rollout.scores.total, **_named(rollout.scores.terms)}.items():
        powers = torch.stack([scores.double(), scores.double() ** 2], dim=1)
        mean, mean_square = (all_sum(powers.sum(dim=0)) / num_images).tolist()
        metrics[f"{name}/mean"] = mean
        metrics[f"{name}/std"] = max(mean_square - mean**2, 0.0) ** 0.5
    difference = half_differences(rollout.scores.total)
    distance = half_differences(rollout.trajectories.latents[:, -1]).flatten(1).pow(2).mean(dim=1)
    sums = torch.stack([difference.abs().sum(), (difference == 0).float().sum(), distance.sum()]).double()
    absolute, ties, distances = (all_sum(sums) / num_images).tolist()
    return metrics | {
        "reward/difference": absolute,
        "reward/ties": ties,
        "rollout/pair_distance": distances**0.5,
        "rollout/images_per_second": num_images / rollout.seconds,
    }


def _named(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"reward/{name}": scores for name, scores in terms.items()}
