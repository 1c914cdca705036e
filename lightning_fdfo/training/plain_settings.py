"""Settings as plain data, and the differences between two."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

MAX_TEXT = 120
"""Characters of a value in a line."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = MAX_TEXT
_ABSENT = object()


def class_path(value: Any) -> str:
    """Where the class of an object, or a function itself, is defined.

    Example:
        >>> import torch
        >>> class_path(torch.ones(1)), class_path(class_path)
        ('torch.Tensor', 'lightning_fdfo.training.plain_settings.class_path')
    """
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def plain(value: Any) -> Any:
    """A value as dictionaries, lists, strings and numbers; what is none of these is left out of what holds it.

    Example:
        >>> plain({"betas": (0.9, 0.99), "call": print, 3: None})
        {'betas': [0.9, 0.99], 3: None}
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        items = {key if type(key) in (int, str) else str(key): plain(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not _ABSENT}
    if isinstance(value, list | tuple):
        return [item for item in map(plain, value) if item is not _ABSENT]
    return None if value is None else _ABSENT


def short(value: Any) -> str:
    """A value in a few characters, none of which controls a terminal."""
    text = "nothing" if value is _ABSENT else _SHORT.repr(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def differences(saved: Any, own: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two records differ, each place once.

    Args:
        saved: a checkpoint's; it may come from anywhere.
        own: a configuration's.
        name: of what is compared.

    Yields:
        Name, what the checkpoint has, what the configuration has.

    Example:
        >>> list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}))
        [('a.c', '2', '3'), ('d', 'nothing', '4')]
    """
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in [*own, *(key for key in saved if key not in own)]:
            path = f"{name}.{short(key).strip(chr(39))}" if name else str(key)
            yield from differences(saved.get(key, _ABSENT), own.get(key, _ABSENT), path)
    elif type(saved) is not type(own) or saved != own:
        yield name, short(saved), short(own)
