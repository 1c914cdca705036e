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

MAX_RATIO = 32
"""Of an image's sides, where the short one is enlarged: 128 pixels become 128 x 4096 at most."""
MAX_LINE_RATIO = 100
"""Of a line's width to its height: beyond it no text can be read, and each column costs 75 kB of probabilities."""


def at_most_so_narrow(image: Tensor) -> Tensor:
    """Pads the short side, with the edge's own pixels, to 1 / MAX_RATIO of the long one; positions stay.

    Args:
        image: uint8 [3, H, W].

    Example:
        >>> import torch
        >>> at_most_so_narrow(torch.zeros(3, 1, 1000, dtype=torch.uint8)).shape
        torch.Size([3, 32, 1000])
    """
    height, width = image.shape[1:]
    below, beside = (max(0, -(-long // MAX_RATIO) - short) for short, long in ((height, width), (width, height)))
    if not below and not beside:
        return image
    return F.pad(image[None].float(), (0, beside, 0, below), mode="replicate")[0].byte()


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


def num_columns(height: int, width: int) -> int:
    """The recogniser's columns of an image that is one line, at least MIN_COLUMNS.

    Example:
        >>> num_columns(32, 64), num_columns(64, 64)
        (12, 12)
        >>> num_columns(32, 128)
        24
    """
    return max(-(-_line_width(height, width) // COLUMN_WIDTH), MIN_COLUMNS)


def _line_width(height: int, width: int) -> int:
    """An image's width in pixels where its height is LINE_HEIGHT."""
    return max(1, round(LINE_HEIGHT * min(width / height, MAX_LINE_RATIO)))


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
    new_width = _line_width(height, width)
    resized = F.interpolate(
        image[None].float(), (LINE_HEIGHT, new_width), mode="bilinear", antialias=height > LINE_HEIGHT
    )
    padded_width = COLUMN_WIDTH * max(num_columns(height, width), min_columns)
    padded = F.pad(resized, (0, padded_width - new_width, 0, 0), mode="replicate")
    return padded[0].flip(0) / 127.5 - 1
