"""Rewards: the contract, and the registry of entry points.

A reward is a class that scores images. It becomes known by an entry point of its distribution:

    [project.entry-points."lightning_fdfo.rewards"]
    JPEGSize = "lightning_fdfo_rewards.jpeg_size:JPEGSize"

or is named by a dotted path (`my_package.my_module.MyReward`), without packaging; a path may lead to a plain function
of images, prompts and metadata as well. Plugins are code: installing one is trusting it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError, StoppedError
from lightning_fdfo.reward_signature import check_signature, read_signature
from lightning_fdfo.weights import Weights

ENTRY_POINT_GROUP = "lightning_fdfo.rewards"

Metadata = Mapping[str, Any]
Scorer = Callable[..., Tensor]
"""A plain function as a reward: `(images, prompts, metadata, **options) -> [N]`."""


class Reward(ABC):
    """Scores images. Not an nn.Module: it stays out of state_dict, DDP and sharding.

    `__init__` stores options, as public attributes, and imports nothing heavy. `setup` loads what they name, once, into
    attributes that start with an underscore. So a reward pickles by its configuration: underscored attributes are left
    out, and the copy is set up anew where it arrives. `lightning_fdfo.testing.check_reward` checks all of it.

    Example:
        >>> class Brightness(Reward):
        ...     range = (0.0, 1.0)
        ...     def __call__(self, images, prompts, metadata):
        ...         return images.mean(dim=(1, 2, 3))
        >>> Brightness()(torch.ones(2, 3, 8, 8), ["a", "b"], [{}, {}])
        tensor([1., 1.])
    """

    range: tuple[float, float] = (float("-inf"), float("inf"))
    """Lowest and highest score that can come, with the options' defaults; an instance may have its own."""
    higher_is_better: bool = True
    """False for a cost: a mixture then turns its sign, so that a positive weight always asks for better images."""
    required_metadata: tuple[str, ...] = ()
    """Keys that each prompt's metadata must have."""
    needs: str = ""
    """What it needs of a prompt, in words, where `required_metadata` does not say it all; empty: nothing."""
    weights: tuple[Weights, ...] = ()
    """What `setup` loads, with the options' defaults; an instance may have its own."""
    packaged_weights: str = ""
    """Weights that came with an installed package: which, and their licence, in words."""
    device: str | None = None
    """Where it runs, if not beside the flow: "cpu" for a reward that has no use for a GPU."""

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Remembers what it is made with: a message names the command that makes it again."""
        reward = super().__new__(cls)
        vars(reward)["_made_with"] = (arguments, options)
        return reward

    @property
    def name(self) -> str:
        """What messages call it: its class's name."""
        return type(self).__name__

    def fetch(self) -> None:
        """Fetches its weights into the cache; called on one process of each machine, before any model is loaded."""
        for weights in self.weights:
            weights.fetch()

    def setup(self, device: torch.device) -> None:  # noqa: B027 - a reward without weights has nothing to set up
        """Loads weights onto `device`, once; called before the first score, perhaps more than once."""

    def check(self, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError if this prompt cannot be scored; called for each prompt before any model loads."""
        missing = [key for key in self.required_metadata if key not in metadata]
        if missing:
            raise ConfigurationError(f"{self.name} needs metadata {missing}, got keys {sorted(metadata)}")

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of some prompts are longer than it reads; asked once, after `setup`, so that a run can warn."""
        return 0

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores a batch.

        It should leave its arguments as they are. A mixture hands each reward copies of its own, so that one that
        does not changes nothing for others.

        Args:
            images: [N, 3, H, W], float32 in [0, 1], on the device of `setup`.
            prompts: N strings.
            metadata: N mappings.

        Returns:
            [N], finite real numbers within float32's range, on the images' device or the CPU. float64 is kept until a
            pair's scores are subtracted; whole numbers and bool (as 0 and 1) count as numbers, complex ones do not.
        """

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy: nobody has said what it is made with, but its attributes."""
        self.__dict__ = dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Its configuration: public attributes only."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class FunctionReward(Reward):
    """A plain function as a reward.

    Args:
        function: `function(images, prompts, metadata, **options) -> [N]`, as `Reward.__call__`.
        options: keyword arguments for it.

    Raises:
        ConfigurationError: a function that does not take these.

    Example:
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
    near = difflib.get_close_matches(name, names, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"unknown reward {name!r}{guess}; installed: {', '.join(names) or 'none: pip install lightning-fdfo-rewards'}"
    )
