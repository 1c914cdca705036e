"""A plain function as a reward, and the check that it can be called as one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.base import BaseReward, Metadata, Reward, Scorer


class FunctionReward(Reward):
    """A plain function as a reward.

    Args:
        function: `function(images, prompts, metadata, **options) -> [N]`, as `Reward.__call__`.
        options: keyword arguments for it.

    Raises:
        ConfigurationError: a function that does not take these.

    Example:
        >>> import torch
        >>> brightest = FunctionReward(lambda images, prompts, metadata: images.amax(dim=(1, 2, 3)))
        >>> brightest(torch.ones(1, 3, 2, 2), [""], [{}])
        tensor([1.])
    """

    def __init__(self, function: Scorer, **options: Any) -> None:
        check_signature(function, options)
        self.function = functools.partial(function, **options) if options else function

    @property
    def name(self) -> str:
        """The function's name."""
        function = self.function.func if isinstance(self.function, functools.partial) else self.function
        return getattr(function, "__name__", type(function).__name__)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Calls it."""
        return self.function(images, prompts, metadata)


def as_reward(scorer: BaseReward | Scorer) -> BaseReward:
    """A reward as it is; a plain function in a FunctionReward."""
    return scorer if isinstance(scorer, BaseReward) else FunctionReward(scorer)


def read_signature(found: Callable[..., Any]) -> inspect.Signature | None:
    """A callable's signature; None for one written in C that has none, as torch.mean."""
    try:
        return inspect.signature(found)
    except (ValueError, TypeError):
        return None


def check_signature(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises ConfigurationError for a function that cannot be called as a reward."""
    called = ", ".join(["images, prompts, metadata", *(f"{option}=…" for option in options)])
    name, signature = getattr(function, "__name__", repr(function)), read_signature(function)
    if signature is None:
        raise ConfigurationError(
            f"{function!r} says nothing of its arguments, so it is not taken for a reward: expected a class, or a "
            f"function ({called}) -> [N] scores, such as: def score(images, prompts, metadata): ..."
        )
    try:
        signature.bind(None, None, None, **options)
    except TypeError as error:
        raise ConfigurationError(
            f"{name}{signature} is no reward: expected a function ({called}) -> [N] scores: {error}"
        ) from error
