"""Lines of text: their reading order, and their form for the recogniser."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

LINE_HEIGHT = 48
COLUMN_WIDTH = 8
"""Pixels of a line of LINE_HEIGHT that the recogniser turns into one column."""
MIN_COLUMNS = 12
"""Narrower lines are padded to it: of a square image fewer words are read without."""


def reading_order(boxes: npt.NDArray[Any]) -> list[int]:
    """Indices of boxes, line by line from top to bottom, each line from left to right.

    A box goes on with the line whose last box it overlaps in height by more than half of the lower one: words of one
    line need not have the same top or size, and a line may slope.

    Args:
        boxes: [N, 4] of left, top, right, bottom.

    Example:
        >>> reading_order(np.array([[0, 50, 90, 70], [50, 2, 90, 20], [0, 8, 40, 25]]))
        [2, 1, 0]
    """
    lines: list[list[int]] = []
    for index in np.argsort(boxes[:, 0], kind="stable").tolist():
        overlaps = [_overlap(boxes[line[-1]], boxes[index]) for line in lines]
        if max(overlaps, default=0.0) > 0.5:
            lines[int(np.argmax(overlaps))].append(index)
        else:
            lines.append([index])
    return [index for line in sorted(lines, key=lambda line: boxes[line][:, 1::2].mean()) for index in line]


def _overlap(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """The share of the lower box's height that both boxes have in common; below 0 where they are apart."""
    common = min(one[3], other[3]) - max(one[1], other[1])
    return float(common / max(1, min(one[3] - one[1], other[3] - other[1])))


def as_line(image: Tensor, min_columns: int = 0) -> Tensor:
    """An image as the recogniser wants it.

    Args:
        image: uint8 [3, H, W], RGB.
        min_columns: padded with its own last column of pixels to so many of the recogniser's columns, if they are more
            than MIN_COLUMNS.

    Returns:
        float32 [3, 48, width] in [-1, 1], BGR, the width a multiple of 8.
    """
    _, height, width = image.shape
    new_width = max(1, round(LINE_HEIGHT * width / height))
    resized = F.interpolate(
        image[None].float(), (LINE_HEIGHT, new_width), mode="bilinear", antialias=height > LINE_HEIGHT
    )
    padded_width = COLUMN_WIDTH * max(-(-new_width // COLUMN_WIDTH), MIN_COLUMNS, min_columns)
    padded = F.pad(resized, (0, padded_width - new_width, 0, 0), mode="replicate")
    return padded[0].flip(0) / 127.5 - 1
