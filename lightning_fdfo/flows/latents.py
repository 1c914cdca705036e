"""Latents as tokens and as pixels, and what depends on their number: pure functions that model families share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_multiple(size: int, multiple: int) -> int:
    """Of what a size must be a multiple of, the nearest one, at least one.

    Example:
        >>> nearest_multiple(500, 16), nearest_multiple(3, 16)
        (496, 16)
    """
    return max(1, round(size / multiple)) * multiple


def to_unit_range(images: Tensor) -> Tensor:
    """A VAE's images, in [-1, 1], to float32 in [0, 1]; what is not finite becomes NaN: clamped, it would be a colour.

    Example:
        >>> to_unit_range(torch.tensor([-2.0, 0.0, 1.0, torch.inf]))
        tensor([0.0000, 0.5000, 1.0000,    nan])
    """
    images = images.float()
    return torch.where(images.isfinite(), (images / 2 + 0.5).clamp(0, 1), torch.nan)


def dynamic_shift(config: Any, num_tokens: int) -> float:
    """The pipelines' mu: linear in the number of image tokens."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (num_tokens - config.base_image_seq_len))


def pack(latents: Tensor) -> Tensor:
    """[N, C, H, W] to tokens [N, H W / 4, 4 C], each of 2 x 2 latent pixels.

    Example:
        >>> pack(torch.zeros(1, 16, 4, 6)).shape
        torch.Size([1, 6, 64])
    """
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse of `pack`, for latents of height x width.

    Example:
        >>> latents = torch.arange(48.0).view(1, 2, 4, 6)
        >>> torch.equal(unpack(pack(latents), 4, 6), latents)
        True
    """
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, height // 2, width // 2), 2)
