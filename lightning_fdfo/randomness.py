"""Random numbers without state: each is a function of (seed, epoch, global pair index).

So a run is the same on any number of devices and with any rollout batch size, and a run resumes exactly.
Numbers are drawn on the CPU, one generator a pair, so that they do not depend on the device either.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What numbers are drawn for; each stream is independent of the others."""

    LATENTS = 0
    """A pair's initial latents, then its churn noise."""
    POINTS = 1
    """Which points of a pair are trained on, and in which update."""
    PROMPTS = 2
    """The order of the prompts."""
    VALIDATION = 3
    """The fixed initial latents of a validation image."""
    ADAPTER = 4
    """The LoRA's initial weights."""
    DROPOUT = 5
    """What the LoRA's dropout leaves out of a batch."""


def generator(stream: Stream, seed: int, epoch: int = 0, index: int = 0) -> torch.Generator:
    """A CPU generator that depends on its arguments alone.

    Args:
        stream: what the numbers are for.
        seed: the run's seed, >= 0.
        epoch: >= 0.
        index: the global pair index (or the image's, in validation), >= 0.

    Example:
        >>> a, b = (generator(Stream.LATENTS, seed=0, epoch=3, index=7) for _ in range(2))
        >>> bool(torch.randn(1, generator=a) == torch.randn(1, generator=b))
        True

    Source: numpy.random.SeedSequence, which mixes the integers so that near ones give unrelated streams.
    """
    state = np.random.SeedSequence([int(stream), seed, epoch, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & 0x7FFF_FFFF_FFFF_FFFF)


def stack_normal(generators: list[torch.Generator], *shape: int) -> Tensor:
    """Standard normal numbers, float32 [len(generators), *shape], row i from generator i."""
    return torch.stack([torch.randn(shape, generator=each, dtype=torch.float32) for each in generators])


def branch_normal(generators: list[torch.Generator], *shape: int, antithetic: bool = False) -> Tensor:
    """Standard normal numbers for both branches of pairs, float32 [2 * len(generators), *shape].

    Args:
        generators: one a pair; rows 2i and 2i+1 are pair i's.
        shape: of a branch.
        antithetic: the second branch's numbers are the first's with the opposite sign, and half as many are drawn;
            otherwise the two are independent. Each branch alone is standard normal either way.

    Example:
        >>> numbers = branch_normal([generator(Stream.LATENTS, seed=0)], 3, antithetic=True)
        >>> numbers.shape, numbers.sum(dim=0)
        (torch.Size([2, 3]), tensor([0., 0., 0.]))
    """
    if not antithetic:
        return stack_normal(generators, 2, *shape).flatten(0, 1)
    numbers = stack_normal(generators, *shape)
    return torch.stack([numbers, -numbers], dim=1).flatten(0, 1)


def prompt_rows(seed: int, first: int, count: int, num_prompts: int) -> list[int]:
    """Rows of the prompt file for draws first … first + count - 1 of a run.

    The file is gone through again and again, each time in a new order, so that every prompt is used equally often.

    Args:
        seed: the run's seed.
        first: number of the first draw, >= 0; draw n of epoch e is e * num_pairs + n.
        count: how many.
        num_prompts: rows in the file, >= 1.

    Example:
        >>> sorted(prompt_rows(seed=0, first=3, count=3, num_prompts=3))
        [0, 1, 2]
    """
    orders: dict[int, list[int]] = {}
    rows = []
    for draw in range(first, first + count):
        turn, place = divmod(draw, num_prompts)
        if turn not in orders:
            shuffled = torch.randperm(num_prompts, generator=generator(Stream.PROMPTS, seed, turn))
            orders[turn] = shuffled.tolist()
        rows.append(orders[turn][place])
    return rows
