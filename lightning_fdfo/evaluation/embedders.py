"""Models that embed images, so that distances mean visual difference: CLIP, or DreamSim if it is installed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import HubFiles

DREAMSIM = "dreamsim"


class Embedder(ABC):
    """Embeds images. It stores a name; `setup` loads what that names."""

    @abstractmethod
    def fetch(self) -> None:
        """Finds the weights, or fetches them into the cache; raises ConfigurationError if they cannot be had."""

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Loads the model onto `device`."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] to embeddings [N, D], float32."""


class CLIPEmbedder(Embedder):
    """The image tower of a CLIP in transformers.

    Args:
        pretrained: a hub name or a folder.
    """

    def __init__(self, pretrained: str) -> None:
        self.hub_files = HubFiles(pretrained)

    def fetch(self) -> None:
        """Finds the model, or fetches it."""
        try:
            self.hub_files.fetch()
        except ConfigurationError as error:
            raise ConfigurationError(f"evaluation.diversity: {error}") from error

    def setup(self, device: torch.device) -> None:
        """Loads the model, in float32, and lets its text tower go."""
        from transformers import CLIPModel

        folder = self.hub_files.fetch()
        try:
            model, info = CLIPModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # of another class's configuration, safetensors' own, a missing file
            raise ConfigurationError(
                f"evaluation.diversity: {folder} holds no CLIP model that transformers can read: {error}"
            ) from error
        if info["missing_keys"]:
            raise ConfigurationError(
                f"evaluation.diversity: {folder} holds no complete CLIP: {sorted(info['missing_keys'])[0]!r} is missing"
            )
        model.text_model = None
        self._model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Resizes the shortest side, crops the centre and embeds, as CLIP's own preprocessing says."""
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        size = self._model.config.vision_config.image_size
        scale = size / min(images.shape[-2:])
        height, width = (int(side * scale + 1e-6) for side in images.shape[-2:])
        resized = _bicubic(images, height, width)
        top, left = (height - size) // 2, (width - size) // 2
        mean, std = (images.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        pixels = (resized[..., top : top + size, left : left + size] - mean) / std
        with torch.autocast(images.device.type, enabled=False):
            features = self._model.get_image_features(pixel_values=pixels)
        # transformers 5 wraps the embeddings, transformers 4 did not
        embeddings: Tensor = features if isinstance(features, Tensor) else features.pooler_output
        return embeddings


class DreamSimEmbedder(Embedder):
    """The ensemble of DreamSim, whose distances were fitted to what people find alike.

    The package brings torchvision, timm and open_clip, so that none of our extras has it: `pip install dreamsim`.

    Source: Fu et al. 2023, arXiv 2306.09344.
    """

    def fetch(self) -> None:
        """Looks for the package; it fetches its own weights."""
        if find_spec(DREAMSIM) is None:
            raise ConfigurationError(
                "evaluation.diversity: dreamsim is not installed: pip install dreamsim, or name a CLIP, such as "
                "openai/clip-vit-large-patch14"
            )

    def setup(self, device: torch.device) -> None:
        """Loads the package's own model, whose weights go to `~/.cache/lightning_fdfo/dreamsim`."""
        cache = Path("~/.cache/lightning_fdfo/dreamsim").expanduser()
        cache.parent.mkdir(parents=True, exist_ok=True)
        package: Any = import_module(DREAMSIM)
        model, _ = package.dreamsim(pretrained=True, device=str(device), cache_dir=str(cache))
        self._model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Resizes to 224 pixels a side, as the package does, and embeds."""
        embeddings: Tensor = self._model.embed(_bicubic(images, 224, 224)).float()
        return embeddings


def named_embedder(name: str) -> Embedder:
    """The embedder of a name in a configuration: `dreamsim`, or a CLIP.

    Example:
        >>> named_embedder("openai/clip-vit-large-patch14").hub_files.source
        'openai/clip-vit-large-patch14'
    """
    return DreamSimEmbedder() if name == DREAMSIM else CLIPEmbedder(name)


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    resized = F.interpolate(images.float(), (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1)
