"""What rapidocr's recogniser reads in a batch of images: once for all rewards that score it.

A likelihood and an exact match, as a reward and a metric, are two scores of one reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo_rewards.ocr_lines import MIN_COLUMNS, as_line, num_columns
from lightning_fdfo_rewards.ocr_rapidocr import Recogniser, find_lines


class Piece(NamedTuple):
    """A piece of text as it was read: all of its probabilities, of all images, would be gigabytes."""

    best: Tensor
    """long [columns], each column's most likely character"""
    probabilities: Tensor
    """float32 [columns, 1 + W], of blank or space, then of the W different characters of the target, by their index"""


def read_images(
    recogniser: Recogniser,
    pixels: Tensor,
    targets: Sequence[str],
    *,
    min_columns: Sequence[int],
    detect: bool,
    batch_size: int,
) -> list[list[Piece]]:
    """The pieces of text in each image.

    The recogniser keeps what it reads until it is given anything else: the same arguments cost one reading, and images
    are the same if their pixels are.

    Args:
        recogniser: whose last reading may be the one.
        pixels: uint8 [N, 3, H, W].
        targets: N texts, whose characters' probabilities are kept, but for those that the recogniser does not know.
        min_columns: N numbers of columns that an image's pieces must have together; most have more anyway.
        detect: find pieces of text first; otherwise each image is one.
        batch_size: lines a forward.

    Returns:
        N lists, in reading order.
    """
    wanted = tuple(
        tuple(sorted({recogniser.indices[one] for one in target if one in recogniser.indices})) for target in targets
    )
    has_anyway = MIN_COLUMNS if detect else num_columns(*pixels.shape[2:])
    columns = tuple(max(number, has_anyway) for number in min_columns)
    content = hashlib.sha256(pixels.contiguous().numpy().data).digest()
    key = (content, tuple(pixels.shape), wanted, columns, detect, batch_size)
    return recogniser.last.get(key, lambda: _read(recogniser, pixels, wanted, columns, detect, batch_size))


def _read(
    recogniser: Recogniser,
    pixels: Tensor,
    wanted: Sequence[Sequence[int]],
    min_columns: Sequence[int],
    detect: bool,
    batch_size: int,
) -> list[list[Piece]]:
    lines: list[Tensor] = []
    owners: list[int] = []
    for index, image in enumerate(pixels):
        pieces = find_lines(image) if detect else [image]
        share = -(-min_columns[index] // len(pieces))
        lines += [as_line(piece, share) for piece in pieces]
        owners += [index] * len(pieces)
    by_width: dict[int, list[int]] = {}
    for position, line in enumerate(lines):  # no padding to one width: a score must not depend on its batch
        by_width.setdefault(line.shape[-1], []).append(position)
    spaces = [0, recogniser.indices[" "]]
    kept: dict[int, Piece] = {}
    for positions in by_width.values():
        for start in range(0, len(positions), batch_size):
            chunk = positions[start : start + batch_size]
            probabilities = recogniser.probabilities([lines[position] for position in chunk])
            best = torch.from_numpy(probabilities.numpy().argmax(axis=-1))  # NumPy's takes a fraction of torch's time
            for position, row, most_likely in zip(chunk, probabilities, best, strict=True):
                blank = row[:, spaces].sum(-1, keepdim=True)
                target = row[:, list(wanted[owners[position]])]
                kept[position] = Piece(most_likely, torch.cat([blank, target], dim=-1))
    read: list[list[Piece]] = [[] for _ in pixels]
    for position, owner in enumerate(owners):
        read[owner].append(kept[position])
    return read
