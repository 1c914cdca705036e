"""PickScore: a CLIP model that was trained on people's choices between two images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fdfo.hub import HubFiles
from lightning_fdfo_rewards.clip import CLIP, load_clip
from lightning_fdfo_rewards.model_reward import DType, ModelReward
from lightning_fdfo_rewards.preprocessing import crop_to_square, normalize

PICK_SCORE = HubFiles("yuvalkirstain/PickScore_v1")
LAION_TOKENIZER = HubFiles("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ("tokenizer*.json",), "MIT")


class PickScore(ModelReward):
    """exp(logit_scale) times the cosine of the image's and the prompt's embedding, about 18 to 26.

    That is the scale of the FDFO paper; some others divide it by 26.

    Args:
        pretrained: a CLIPModel of transformers: a hub name or a folder.
        tokenizer: a hub name or a folder.
        revision: of `pretrained`: branch, tag or commit on the hub.
        dtype: of the weights, float32 or bfloat16.
        batch_size: images per forward.
        device: where it runs; None: beside the flow.

    Raises:
        ConfigurationError: an option out of range; from `fetch`: weights that cannot be had.

    Example:
        >>> [files.source for files in PickScore().hub_files]
        ['yuvalkirstain/PickScore_v1', 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K']

    Source: Kirstain et al. 2023, arXiv 2305.01569.
    """

    range = (-100.0, 100.0)
    needs = "the prompt; 77 tokens are read"
    hub_files = (PICK_SCORE, LAION_TOKENIZER)

    def __init__(
        self,
        pretrained: str = PICK_SCORE.source,
        tokenizer: str = LAION_TOKENIZER.source,
        revision: str = "main",
        dtype: DType = "float32",
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        super().__init__(dtype, batch_size, device)
        self.hub_files = (
            HubFiles(pretrained, revision=revision, licence=PICK_SCORE.licence),
            HubFiles(tokenizer, LAION_TOKENIZER.files, LAION_TOKENIZER.licence),
        )

    def load(self, device: torch.device) -> CLIP:
        """Reads the model and the tokenizer."""
        model, tokenizer = (files.fetch() for files in self.hub_files)
        return load_clip(model, tokenizer, self.dtype, device)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more than 77 tokens."""
        clip: CLIP = self.model
        return clip.count_truncated(prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores one batch."""
        clip: CLIP = self.model
        pixels = normalize(crop_to_square(images, clip.image_size))
        cosine = (clip.embed_images(pixels) * clip.embed_texts(prompts)).sum(dim=-1)
        score: Tensor = clip.model.logit_scale.float().exp() * cosine
        return score
