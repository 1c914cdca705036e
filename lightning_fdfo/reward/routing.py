r"""Routing: which rewards of a mixture a prompt is for.

    {"prompt": "\"427\" in red", "rewards": {"OCR": 1, "small": 0.5}}
    {"prompt": "a cat on a red sofa", "rewards": {"HPSv2": 1}}

A prompt's `rewards` name the terms that score its images; each number multiplies the term's weight, and 0 scores and
logs without training on it, as in the mixture. What is not named is not scored, and asks nothing of the prompt. A
prompt without `rewards` goes to all terms, with 1. Validation's metrics are named in the same way.
`lightning-fdfo rewards score` asks all that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.base import Metadata

ROUTE = "rewards"
"""The key in a prompt's metadata."""


def check_route(metadata: Metadata, terms: Collection[str], known: Collection[str]) -> None:
    """Checks a prompt's `rewards`.

    Args:
        metadata: the prompt's.
        terms: names in the mixture; one of them at least must be named.
        known: names that may be, those of metrics too.

    Raises:
        ConfigurationError: it is no mapping from such names to finite numbers.

    Example:
        >>> check_route({"rewards": {"ORC": 1}}, ["OCR", "small"], ["OCR", "small"])
        Traceback (most recent call last):
        ...
        lightning_fdfo.errors.ConfigurationError: "rewards": unknown 'ORC'; the mixture has OCR, small
    """
    if ROUTE not in metadata:
        return
    route = metadata[ROUTE]
    if not isinstance(route, Mapping):
        raise ConfigurationError(f'"{ROUTE}": expected an object like {{"{next(iter(terms))}": 1}}, got {route!r}')
    for name, number in route.items():
        if name not in known:
            raise ConfigurationError(f'"{ROUTE}": unknown {name!r}; the mixture has {", ".join(known)}')
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ConfigurationError(f'"{ROUTE}": expected a finite number for {name!r}, got {number!r}')
    if not set(terms) & set(route):
        raise ConfigurationError(f'"{ROUTE}": expected at least one of {", ".join(terms)}, got {dict(route)!r}')


def is_for(name: str, metadata: Metadata) -> bool:
    """Whether a prompt's images are scored by a term."""
    return ROUTE not in metadata or name in metadata[ROUTE]


class Route(NamedTuple):
    """Which of N images a term scores, and how much it counts for each."""

    routed: Tensor
    """[N], bool"""
    multiplier: Tensor
    """[N], float32: by which the term's weight is multiplied; 0 where it is not routed"""

    @staticmethod
    def everywhere(count: int) -> Route:
        """All of `count` images, with 1."""
        return Route(torch.ones(count, dtype=torch.bool), torch.ones(count))


def routes(names: Iterable[str], metadata: Sequence[Metadata]) -> dict[str, Route]:
    """Which of a mixture's terms score the images of some prompts.

    Args:
        names: of the terms.
        metadata: of N prompts.

    Returns:
        name -> Route of N images.

    Example:
        >>> found = routes(["OCR", "small"], [{}, {"rewards": {"OCR": 2}}])
        >>> found["OCR"].multiplier, found["small"].routed
        (tensor([1., 2.]), tensor([ True, False]))
    """
    return {
        name: Route(
            torch.tensor([is_for(name, row) for row in metadata], dtype=torch.bool),
            torch.tensor([row[ROUTE].get(name, 0.0) if ROUTE in row else 1.0 for row in metadata]).float(),
        )
        for name in names
    }
