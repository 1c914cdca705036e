"""From images to a model's pixels, on tensors and on their device.

What two rewards do alike stands here; what one does alone stands with it. Images are [N, 3, H, W], float in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def crop_to_square(images: Tensor, size: int, rounding: Callable[[float], int] = math.floor) -> Tensor:
    """Resizes the shortest side to `size` (bicubic, antialiased) and crops the centre.

    Args:
        images: [N, 3, H, W].
        size: pixels.
        rounding: of the crop's corner (H - size) / 2: transformers takes the floor, torchvision Python's `round`.

    Returns:
        [N, 3, size, size], in [0, 1] as an 8-bit resize would give.

    Example:
        >>> crop_to_square(torch.ones(1, 3, 30, 40), 8).shape
        torch.Size([1, 3, 8, 8])
    """
    height, width = images.shape[-2:]
    shortest = min(height, width)
    resized = _bicubic(images, int(size * height / shortest), int(size * width / shortest)).clamp(0, 1)
    top, left = (rounding((side - size) / 2) for side in resized.shape[-2:])
    return resized[..., top : top + size, left : left + size]


def pad_to_square(images: Tensor, size: int) -> Tensor:
    """Resizes the longest side to `size` (bicubic, antialiased, not clamped) and pads with zeros around.

    Args:
        images: [N, 3, H, W].
        size: pixels.

    Returns:
        [N, 3, size, size].

    Example:
        >>> pad_to_square(torch.ones(1, 3, 4, 8), 8)[0, 0, :, 0]
        tensor([0., 0., 1., 1., 1., 1., 0., 0.])
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    resized = _bicubic(images, round(height * scale), round(width * scale))
    above, beside = size - resized.shape[-2], size - resized.shape[-1]
    return F.pad(resized, (beside // 2, beside - beside // 2, above // 2, above - above // 2))


def normalize(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(images - mean) / std, a channel at a time."""
    return (images - _channels(mean, images)) / _channels(std, images)


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    if (height, width) == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
