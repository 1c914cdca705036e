"""Scores of what an OCR engine reads, and of the probabilities that it gives: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def edit_similarity(read: str, target: str) -> float:
    """1 - Levenshtein distance / length of the target, at least 0.

    Example:
        >>> edit_similarity("428", "427"), edit_similarity("", "7"), edit_similarity("4274", "42")
        (0.6666666666666667, 0.0, 0.0)
    """
    from rapidfuzz.distance import Levenshtein

    return max(0.0, 1 - Levenshtein.distance(read, target) / len(target))


def exact_match(read: str, target: str) -> float:
    """1.0 if they are equal, else 0.0."""
    return float(read == target)


def join(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces of text as one: a column that is surely blank between them, so that l|l is not read as one l.

    Args:
        pieces: probabilities [columns, characters] each, character 0 is the blank.

    Example:
        >>> join([torch.tensor([[0.2, 0.8]]), torch.tensor([[0.3, 0.7]])]).tolist()[1]
        [1.0, 0.0]
    """
    blank = F.one_hot(torch.tensor([0]), pieces[0].shape[-1]).to(pieces[0])
    return torch.cat([part for piece in pieces for part in (blank, piece)][1:])


def ctc_log_likelihood(probabilities: Tensor, target: Sequence[int]) -> Tensor:
    """Log p(target): the sum over all ways to write it into the columns, with blanks and repeats.

    Args:
        probabilities: [columns, characters], rows sum to at most 1, character 0 is the blank; characters that are not
            in the target may be left out.
        target: indices of the characters; needs len(target) columns, and one more for each repeat.

    Returns:
        0-d, float32, <= 0.

    Example:
        >>> ctc_log_likelihood(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), [1]).exp().item()
        0.75

    Source: Graves et al. 2006; torch.nn.functional.ctc_loss.
    """
    log_probabilities = probabilities.clamp(1e-12, 1.0).log()[:, None]
    loss = F.ctc_loss(
        log_probabilities,
        torch.tensor([list(target)]),
        input_lengths=torch.tensor([len(log_probabilities)]),
        target_lengths=torch.tensor([len(target)]),
        reduction="sum",
    )
    return (-loss).clamp_max(0.0)  # rounding must not make a probability above 1
