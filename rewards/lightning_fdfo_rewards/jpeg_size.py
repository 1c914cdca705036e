"""Compressibility, or its opposite: bytes of the image as JPEG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from lightning_fdfo import Reward
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward import Metadata


class JPEGSize(Reward):
    """Kilobytes (1000 bytes) of the image as JPEG, times `sign`.

    Args:
        quality: of the JPEG, 1 to 95.
        sign: 1 rewards incompressible images, -1 compressible ones.

    Raises:
        ConfigurationError: quality or sign out of range.

    Example:
        >>> JPEGSize(sign=-1)(torch.zeros(1, 3, 64, 64), ["black"], [{}]).item() > -1
        True

    Source: the compressibility task of DDPO (Black et al. 2023, arXiv 2305.13301).
    """

    range = (0.0, float("inf"))

    def __init__(self, quality: int = 95, sign: Literal[1, -1] = 1) -> None:
        if not 1 <= quality <= 95 or sign not in (1, -1):
            raise ConfigurationError(f"JPEGSize: expected quality in 1 … 95 and sign 1 or -1, got {quality}, {sign}")
        self.quality = quality
        self.sign = sign
        if sign == -1:
            self.range = (float("-inf"), 0.0)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores a batch; see `Reward.__call__`."""
        pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([self.sign * self._num_bytes(pixel) / 1000 for pixel in pixels])

    def _num_bytes(self, pixel: object) -> int:
        buffer = io.BytesIO()
        Image.fromarray(pixel).save(buffer, format="JPEG", quality=self.quality)  # type: ignore[arg-type]
        return buffer.tell()
