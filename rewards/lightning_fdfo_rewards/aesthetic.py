"""Aesthetic: LAION's predictor of how much people like an image, whatever it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import HubFiles, cached_weak
from lightning_fdfo_rewards.clip import CLIP, load_clip
from lightning_fdfo_rewards.clip_score import OPENAI_CLIP
from lightning_fdfo_rewards.model_reward import DType, LinearHead, ModelReward, frozen
from lightning_fdfo_rewards.preprocessing import crop_to_square, normalize

HEAD = HubFiles(
    "trl-lib/ddpo-aesthetic-predictor",
    ("aesthetic-model.pth",),
    "Apache-2.0 or MIT: see the repository",
    sha256={"aesthetic-model.pth": "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"},
)


class AestheticModel(NamedTuple):
    """CLIP, and the head on its image embedding."""

    clip: CLIP
    head: LinearHead


class Aesthetic(ModelReward):
    """A linear head on CLIP's unit image embedding, about 1 to 10.

    Args:
        head: a hub repository with `aesthetic-model.pth`, or the file (`sac+logos+ava1-l14-linearMSE`). The official
            file's sha256 is checked; a local file is taken as it is.
        pretrained: the CLIPModel that the head was trained on: a hub name or a folder.
        revision: of `pretrained`: branch, tag or commit on the hub.
        dtype: of CLIP's weights, float32 or bfloat16; the head is always float32.
        batch_size: images per forward.
        device: where it runs; None: beside the flow.

    Raises:
        ConfigurationError: an option out of range; from `fetch`: weights that cannot be had, or a head that is not the
            official one; from `setup`: a head that does not fit CLIP.

    Example:
        >>> Aesthetic().hub_files[0].files
        ('aesthetic-model.pth',)

    Source: the improved aesthetic predictor of LAION (sac+logos+ava1-l14-linearMSE).
    """

    needs = ""
    hub_files = (HEAD, OPENAI_CLIP)

    def __init__(
        self,
        head: str = HEAD.source,
        pretrained: str = OPENAI_CLIP.source,
        revision: str = "main",
        dtype: DType = "float32",
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        super().__init__(dtype, batch_size, device)
        official = head == HEAD.source
        self.hub_files = (
            HEAD if official else HubFiles(head, HEAD.files, HEAD.licence),
            HubFiles(pretrained, revision=revision, licence=OPENAI_CLIP.licence),
        )

    def load(self, device: torch.device) -> AestheticModel:
        """Reads CLIP and the head."""
        head, folder = (files.fetch() for files in self.hub_files)
        model = AestheticModel(load_clip(folder, folder, self.dtype, device), _load_head(head, device))
        takes, gives = model.head[0].in_features, model.clip.model.config.projection_dim
        if takes != gives:
            raise ConfigurationError(f"Aesthetic: {head} takes embeddings of {takes} numbers, CLIP gives {gives}")
        return model

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores one batch."""
        model: AestheticModel = self.model
        pixels = normalize(crop_to_square(images, model.clip.image_size))
        return model.head(model.clip.embed_images(pixels))[:, 0]  # type: ignore[no-any-return]


@cached_weak
def _load_head(file: Path, device: torch.device) -> LinearHead:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return frozen(LinearHead(tensors), device)  # type: ignore[return-value]
    except Exception as error:  # pickle, zip and key errors of a file that is something else
        raise ConfigurationError(f"Aesthetic: {file} is no aesthetic head: {error}") from error
