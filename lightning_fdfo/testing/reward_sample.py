"""What the conformance checks score: a reward, four small images or pairs of them, and their prompts and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lightning_fdfo.reward.base import BaseReward, Metadata, PairReward, Reward
from lightning_fdfo.reward.call import own_metadata

PROMPTS = ('a sign that says "427"', 'a photo of "12" cats', 'the word "YES", painted', "an «ocean» at “58” degrees")
"""Sample prompts; each has a text in quotes, for rewards that look for one."""
TEXTS = ({"text": "427"}, {"text": "12"}, {"text": "YES"}, {"text": "58"})
"""Their metadata."""


@dataclass
class Sample:
    """A reward and something to score."""

    reward: BaseReward
    images: Tensor
    """[4, 3, 64, 64]: a slope, noise, black, white; a `PairReward` compares each with the one before it"""
    prompts: Sequence[str]
    metadata: Sequence[Metadata]
    device: torch.device
    tolerance: float

    def score(self, rows: slice = slice(None), images: Tensor | None = None) -> Tensor:
        """Scores of some of the images, or preferences, of copies, so that a reward cannot change the sample."""
        given = [each[rows].clone() for each in self.arguments(self.images if images is None else images)]
        return self.ask(given, list(self.prompts[rows]), [own_metadata(row) for row in self.metadata[rows]])

    def arguments(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the reward is asked about: images; or the first ones of pairs, and the second ones."""
        return (images, images.roll(1, dims=0)) if isinstance(self.reward, PairReward) else (images,)

    def ask(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """What the reward says of them, which are given to it as they are."""
        if isinstance(self.reward, PairReward):
            first, second = images
            return self.reward(first, second, prompts, metadata)
        (own,) = images
        return cast(Reward, self.reward)(own, prompts, metadata)

    def close(self, scores: Tensor, others: Tensor) -> bool:
        """Whether they agree to the tolerance, relative above 1 and absolute below."""
        return bool(((scores - others).abs() <= self.tolerance * (1 + others.abs())).all())


def make_sample(
    reward: BaseReward, prompts: Sequence[str], metadata: Sequence[Metadata] | None, device: str, tolerance: float
) -> Sample:
    """A sample of 64 x 64 pixels on `device`; see `check_reward` for the arguments.

    Raises:
        ValueError: not four prompts or mappings.
    """
    if metadata is None:
        metadata = TEXTS if prompts is PROMPTS else [{}] * len(prompts)
    if len(prompts) != 4 or len(metadata) != 4:
        raise ValueError(f"expected four prompts and four mappings, got {len(prompts)} and {len(metadata)}")
    return Sample(reward, sample_images(64, 64).to(device), prompts, metadata, torch.device(device), tolerance)


def sample_images(height: int, width: int) -> Tensor:
    """Four images: a slope of colours, noise, black, white: [4, 3, height, width] in [0, 1]."""
    across = torch.linspace(0, 1, width).expand(height, width)
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    slope = torch.stack([across, down, 1 - across])
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    return torch.stack([slope, noise, torch.zeros_like(slope), torch.ones_like(slope)])
