"""Whether a plain function can be called as a reward, as far as its signature tells."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lightning_fdfo.errors import ConfigurationError


def read_signature(found: Callable[..., Any]) -> inspect.Signature | None:
    """None for what is written in C and says nothing of its arguments, as torch.mean."""
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
