"""The registry: rewards by name, from the entry points of what is installed, or by a dotted path.

A distribution makes its rewards known by entry points:

    [project.entry-points."lightning_fdfo.rewards"]
    JPEGSize = "lightning_fdfo_rewards.jpeg_size:JPEGSize"

A dotted path, `my_package.my_module.MyReward`, needs no packaging, and may lead to a plain function of images, prompts
and metadata as well. Plugins are code: to install one is to trust it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from lightning_fdfo.errors import ConfigurationError, StoppedError
from lightning_fdfo.reward.base import BaseReward, PairReward, Reward, Scorer
from lightning_fdfo.reward.function import FunctionReward, read_signature

ENTRY_POINT_GROUP = "lightning_fdfo.rewards"


def available_rewards() -> Mapping[str, EntryPoint]:
    """Names of all installed rewards and their entry points, from metadata alone: nothing is imported.

    A name that two distributions give is here once; `load_reward` refuses it.

    Example:
        >>> "OCR" in available_rewards()
        True
    """
    return MappingProxyType({name: entries[0] for name, entries in _entries_by_name().items()})


def _entries_by_name() -> dict[str, list[EntryPoint]]:
    """All different entry points of each name; the same one twice on the path is one."""
    found: dict[str, dict[tuple[str, str], EntryPoint]] = {}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        found.setdefault(entry.name, {})[distribution_name(entry), entry.value] = entry
    return {name: list(entries.values()) for name, entries in found.items()}


def load_reward(name: str, **init_args: Any) -> BaseReward:
    """An instance of a reward, by its registered name or by a dotted path.

    Args:
        name: `OCR`, or `my_package.my_module.MyReward`, or `my_package.my_module.my_function`.
        init_args: options of its class, or keyword arguments for the function.

    Raises:
        ConfigurationError: unknown name, one that two distributions give, a plugin that cannot be imported, options
            that do not fit.

    Example:
        >>> load_reward("JPEGSize", quality=80).quality
        80
    """
    found, entry = _find(name)
    try:
        reward = found(**init_args) if isinstance(found, type) else FunctionReward(found, **init_args)
    except ConfigurationError as error:
        raise ConfigurationError(error if isinstance(found, type) else f"reward {name!r}: {error}") from error
    except (KeyboardInterrupt, StoppedError):
        raise
    except BaseException as error:  # a plugin is foreign code: whatever it raises is reported with its name
        reason = error if isinstance(error, TypeError | ValueError) else repr(error)
        raise ConfigurationError(f"reward {name}{read_signature(found) or ''}: {reason}") from error
    vars(reward)["_entry"] = entry
    return reward


def load_reward_class(name: str) -> type[BaseReward] | Scorer:
    """What a registered name or a dotted path leads to: a class, or a plain function; raises as `load_reward` does."""
    return _find(name)[0]


def _find(name: str) -> tuple[type[BaseReward] | Scorer, EntryPoint | None]:
    """A class or a plain function, and the entry point that gives it; None for a dotted path."""
    entry = None if "." in name else _entry(name)
    try:
        if entry is not None:
            found = entry.load()
        else:
            module, _, attribute = name.rpartition(".")
            found = getattr(importlib.import_module(module), attribute)
    except (KeyboardInterrupt, StoppedError):
        raise
    except BaseException as error:  # a plugin is foreign code: whatever it raises is reported with its name
        raise ConfigurationError(_not_importable(name, entry, error)) from error
    if not (issubclass(found, Reward | PairReward) if isinstance(found, type) else callable(found)):
        raise ConfigurationError(
            f"reward {name!r}: expected a subclass of lightning_fdfo.Reward or PairReward, or a function, got {found!r}"
        )
    return found, entry


def _entry(name: str) -> EntryPoint:
    """The entry point of a registered name; raises ConfigurationError for none, or for two."""
    entries = _entries_by_name().get(name, [])
    if not entries:
        raise ConfigurationError(_unknown(name))
    if len(entries) > 1:
        one, two = map(distribution_name, entries[:2])
        raise ConfigurationError(
            f"reward {name!r} is given by two distributions, {one} and {two}: uninstall one, or name the class by its "
            "dotted path"
        )
    return entries[0]


def distribution_name(entry: EntryPoint) -> str:
    """Name of the distribution that an entry point comes from."""
    return entry.dist.name if entry.dist is not None else "an unnamed distribution"


def _not_importable(name: str, entry: EntryPoint | None, error: BaseException) -> str:
    """The message for a plugin, or a dotted path, that cannot be imported."""
    origin = "" if entry is None else f" of {distribution_name(entry)}"
    hint = "check the path, and that it imports" if entry is None else "update or uninstall that distribution"
    if isinstance(error, ModuleNotFoundError) and not f"{name}.".startswith(f"{error.name}."):
        hint = f"pip install {str(error.name).partition('.')[0]}"
    return f"reward {name!r}{origin} cannot be imported: {error!r}; {hint}"


def _unknown(name: str) -> str:
    """The message for a name that no distribution gives."""
    names = sorted(available_rewards())
    installed = ", ".join(names) or "none: pip install lightning-fdfo-rewards"
    return f"unknown reward {name!r}{did_you_mean(name, names)}; installed: {installed}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The nearest of some names, for a message; "" if none is near.

    Example:
        >>> did_you_mean("wieght", ["weight", "scale"])
        " (did you mean 'weight'?)"
    """
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
