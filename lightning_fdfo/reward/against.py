"""Images compared with others of the same prompts, by the terms of a mixture that compare two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_fdfo.reward.base import Metadata, PairReward
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.routing import routes
from lightning_fdfo.reward.scores import Scores


def terms_that_validate(mix: RewardMix) -> list[str]:
    """Names of a mixture's terms that compare two images, and do so in validation and `test` too."""
    return [name for name in mix.pair_terms if cast(PairReward, mix.rewards[name]).validates]


def score_against(
    mix: RewardMix,
    names: Iterable[str],
    images: Tensor,
    others: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    *,
    drop: bool = False,
) -> dict[str, Scores]:
    """How images do against others: (1 + preference) / 2, so that 1 is won, 1/2 a tie and 0 lost.

    Both are rounded to 8 bits, as files hold them, so that images that look alike are alike.

    Args:
        mix: set up.
        names: of terms that are a `PairReward`.
        images: [N, 3, H, W] in [0, 1].
        others: [N, 3, H, W], of the same prompts.
        prompts: N strings.
        metadata: N mappings.
        drop: see `RewardMix.start`.

    Returns:
        name -> scores of the N images.

    Raises:
        RewardError: see `RewardMix.start`.
    """
    pairs = (torch.stack([images, others], dim=1).flatten(0, 1) * 255).round() / 255
    texts, facts = [text for text in prompts for _ in range(2)], [row for row in metadata for _ in range(2)]
    scores = mix(pairs, texts, facts, routes=routes(names, facts), drop=drop)
    return {name: one.select(slice(0, None, 2)) for name, one in scores.items()}
