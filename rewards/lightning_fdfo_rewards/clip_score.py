"""CLIPScore: how close CLIP finds image and prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fdfo.hub import HubFiles
from lightning_fdfo_rewards.clip import CLIP, load_clip
from lightning_fdfo_rewards.model_reward import DType, ModelReward
from lightning_fdfo_rewards.preprocessing import crop_to_square, normalize

OPENAI_CLIP = HubFiles("openai/clip-vit-large-patch14", licence="MIT")


class CLIPScore(ModelReward):
    """100 times the cosine of the image's and the prompt's embedding, for each image by itself.

    Args:
        pretrained: any CLIPModel of transformers: a hub name or a folder.
        revision: branch, tag or commit on the hub.
        dtype: of the weights, float32 or bfloat16.
        batch_size: images per forward.
        device: where it runs; None: beside the flow.

    Raises:
        ConfigurationError: an option out of range; from `fetch`: weights that cannot be had.

    Example:
        >>> CLIPScore().hub_files[0].source
        'openai/clip-vit-large-patch14'

    Source: Hessel et al. 2021, arXiv 2104.08718, without its factor of 2.5 and its cut at 0.
    """

    range = (-100.0, 100.0)
    needs = "the prompt; 77 tokens are read"
    hub_files = (OPENAI_CLIP,)

    def __init__(
        self,
        pretrained: str = OPENAI_CLIP.source,
        revision: str = "main",
        dtype: DType = "float32",
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        super().__init__(dtype, batch_size, device)
        self.hub_files = (HubFiles(pretrained, revision=revision, licence=OPENAI_CLIP.licence),)

    def load(self, device: torch.device) -> CLIP:
        """Reads the model."""
        folder = self.hub_files[0].fetch()
        return load_clip(folder, folder, self.dtype, device)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more than 77 tokens."""
        clip: CLIP = self.model
        return clip.count_truncated(prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores one batch."""
        clip: CLIP = self.model
        pixels = normalize(crop_to_square(images, clip.image_size))
        return 100 * (clip.embed_images(pixels) * clip.embed_texts(prompts)).sum(dim=-1)
