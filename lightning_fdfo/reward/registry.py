"""The registry: rewards by name, from the entry points of what is installed, or by a dotted path."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from lightning_fdfo.errors import ConfigurationError, StoppedError
from lightning_fdfo.reward.base import FunctionReward, Reward, Scorer
from lightning_fdfo.reward.signature import read_signature

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
        found.setdefault(entry.name, {})[_distribution(entry), entry.value] = entry
    return {name: list(entries.values()) for name, entries in found.items()}


def load_reward(name: str, **init_args: Any) -> Reward:
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
    found = load_reward_class(name)
    try:
        return found(**init_args) if isinstance(found, type) else FunctionReward(found, **init_args)
    except ConfigurationError as error:
        raise ConfigurationError(error if isinstance(found, type) else f"reward {name!r}: {error}") from error
    except (KeyboardInterrupt, StoppedError):
        raise
    except BaseException as error:  # a plugin is foreign code: whatever it raises is reported with its name
        said = error if isinstance(error, TypeError | ValueError) else repr(error)
        raise ConfigurationError(f"reward {name}{read_signature(found) or ''}: {said}") from error


def load_reward_class(name: str) -> type[Reward] | Scorer:
    """What a registered name or a dotted path leads to: a class, or a plain function; raises as `load_reward` does."""
    entries = [] if "." in name else _entries_by_name().get(name, [])
    if not entries and "." not in name:
        raise ConfigurationError(_unknown(name))
    if len(entries) > 1:
        raise ConfigurationError(
            f"reward {name!r} is given by two distributions, {_distribution(entries[0])} and "
            f"{_distribution(entries[1])}: uninstall one, or name the class by its dotted path"
        )
    entry = entries[0] if entries else None
    try:
        if entry is not None:
            found = entry.load()
        else:
            module, _, attribute = name.rpartition(".")
            found = getattr(importlib.import_module(module), attribute)
    except (KeyboardInterrupt, StoppedError):
        raise
    except BaseException as error:  # a plugin is foreign code: whatever it raises is reported with its name
        origin = f" of {_distribution(entry)}" if entry is not None else ""
        cure = "update or uninstall that distribution" if entry is not None else "check the path, and that it imports"
        if isinstance(error, ModuleNotFoundError) and not f"{name}.".startswith(f"{error.name}."):
            cure = f"pip install {str(error.name).partition('.')[0]}"
        raise ConfigurationError(f"reward {name!r}{origin} cannot be imported: {error!r}; {cure}") from error
    if not (issubclass(found, Reward) if isinstance(found, type) else callable(found)):
        raise ConfigurationError(
            f"reward {name!r}: expected a subclass of lightning_fdfo.Reward or a function, got {found!r}"
        )
    return found  # type: ignore[no-any-return]


def as_reward(scorer: Reward | Scorer) -> Reward:
    """A reward as it is; a plain function in a FunctionReward."""
    return scorer if isinstance(scorer, Reward) else FunctionReward(scorer)


def _distribution(entry: EntryPoint) -> str:
    """Name of the distribution that an entry point comes from."""
    return entry.dist.name if entry.dist is not None else "an unnamed distribution"


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
