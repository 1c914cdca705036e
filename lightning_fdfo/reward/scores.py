"""A reward's scores of a batch of images: values, masks that say which of them count, and half differences of pairs.

Legend: N images, and in a rollout N = 2P, rows 2i and 2i+1 being pair i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.objective import score_differences


class Scores(NamedTuple):
    """One reward's scores of N images.

    An image has no score if it is not routed to the reward, or if the reward failed on it: two masks tell that apart.

    Example:
        >>> scores = Scores.of(torch.tensor([3.0, 1.0]))
        >>> scores.scored.tolist(), scores.failed.tolist()
        ([True, True], [False, False])
    """

    values: Tensor
    """[N], float64, in the reward's own units; 0 where there is no score"""
    scored: Tensor
    """[N], bool: the reward gave a score"""
    routed: Tensor
    """[N], bool: the reward was to give one"""
    multiplier: Tensor
    """[N], float32: by which the prompt multiplies the term's weight; 0 where it is not routed"""

    @property
    def failed(self) -> Tensor:
        """[N], bool: the reward was to give a score, and did not."""
        return self.routed & ~self.scored

    @staticmethod
    def of(values: Tensor) -> Scores:
        """Scores of images that all have one, and count with 1."""
        everywhere = torch.ones(len(values), dtype=torch.bool)
        return Scores(values, everywhere, everywhere, torch.ones(len(values)))

    @staticmethod
    def cat(chunks: Sequence[Scores]) -> Scores:
        """Joins batches."""
        return Scores(*(torch.cat(columns) for columns in zip(*chunks, strict=True)))

    def rounded(self) -> Scores:
        """With values in float32, as they are logged."""
        return self._replace(values=self.values.float())

    def select(self, rows: Tensor | slice) -> Scores:
        """Some of the images."""
        return Scores(*(column[rows] for column in self))


class HalfDifferences(NamedTuple):
    """Half differences of one reward's scores of P pairs."""

    values: Tensor
    """[2P], float32, own minus partner's, halved; 0 where the pair is not compared"""
    compared: Tensor
    """[2P], bool, the same for both branches: both have a score, and the pair was not dropped"""


def kept_pairs(scores: Mapping[str, Scores]) -> Tensor:
    """Pairs of which no reward has failed on a branch: [P], bool. The others are dropped, for all rewards.

    Example:
        >>> fine = Scores.of(torch.zeros(4))
        >>> broken = fine._replace(scored=torch.tensor([True, False, True, True]))
        >>> kept_pairs({"a": fine, "b": broken})
        tensor([False,  True])
    """
    failed = torch.stack([one.failed for one in scores.values()]).any(dim=0)
    return ~failed.view(-1, 2).any(dim=1)


def compare(scores: Mapping[str, Scores]) -> dict[str, HalfDifferences]:
    """Half differences of each reward's scores, in its own units, over the pairs that are kept.

    Example:
        >>> compare({"a": Scores.of(torch.tensor([3.0, 1.0]))})["a"].values
        tensor([ 1., -1.])
    """
    kept = kept_pairs(scores)
    differences = {}
    for name, one in scores.items():
        compared = (one.scored.view(-1, 2).all(dim=1) & kept).repeat_interleave(2)
        differences[name] = HalfDifferences(torch.where(compared, score_differences(one.values), 0.0), compared)
    return differences
