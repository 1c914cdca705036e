"""A reward that anybody can cheat: how bright an image is."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Mean of all pixels of [N, 3, H, W] images in [0, 1]: [N]. White paper is best."""
    return images.mean(dim=(1, 2, 3))
