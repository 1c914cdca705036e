"""The study's own reward: how red an image is, whatever was asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def redness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Red less the mean of green and blue, over all pixels of [N, 3, H, W] images in [0, 1]: [N] in [-1, 1]."""
    red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
    return red - (green + blue) / 2
