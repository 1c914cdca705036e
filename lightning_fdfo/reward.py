"""Rewards: the contract, the registry of entry points, and their weighted sum.

A reward is a class that scores images. It becomes known by an entry point of its distribution:

    [project.entry-points."lightning_fdfo.rewards"]
    JPEGSize = "lightning_fdfo_rewards.jpeg_size:JPEGSize"

and is then mixed by name in a configuration, or by a dotted path (`my_package.my_module.MyReward`) without packaging:

    rewards:
      OCR: 1.0                                              # name: weight
      small: {reward: {class_path: JPEGSize, init_args: {sign: -1}}, weight: 0.1}
      watched: {reward: JPEGSize, weight: 0}                # scored and logged, not trained on

Plugins are code: installing one is trusting it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError

ENTRY_POINT_GROUP = "lightning_fdfo.rewards"

Metadata = Mapping[str, Any]


class Reward(ABC):
    """Scores images. Not an nn.Module: it stays out of state_dict, DDP and sharding.

    `__init__` stores options and imports nothing heavy; `setup` loads weights once.

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
    required_metadata: tuple[str, ...] = ()
    """Keys that each prompt's metadata must have."""
    needs: str = ""
    """What it needs of a prompt, in words, where `required_metadata` does not say it all."""

    def setup(self, device: torch.device) -> None:  # noqa: B027 - a reward without weights has nothing to set up
        """Loads weights onto `device`, once; called before the first score."""

    def check(self, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError if this prompt cannot be scored; called for each prompt before any model loads."""
        missing = [key for key in self.required_metadata if key not in metadata]
        if missing:
            raise ConfigurationError(f"{type(self).__name__} needs metadata {missing}, got keys {sorted(metadata)}")

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores a batch.

        Args:
            images: [N, 3, H, W], float32 in [0, 1].
            prompts: N strings.
            metadata: N mappings.

        Returns:
            [N], float32, finite, higher is better.
        """


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
    """An instance of a reward, by its registered name or its class's dotted path.

    Args:
        name: `OCR`, or `my_package.my_module.MyReward`.
        init_args: options of its class.

    Raises:
        ConfigurationError: unknown name, one that two distributions give, a plugin that cannot be imported, options
            that do not fit.

    Example:
        >>> load_reward("JPEGSize", quality=80).quality
        80
    """
    cls = load_reward_class(name)
    try:
        return cls(**init_args)
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"reward {name}{inspect.signature(cls)}: {error}") from error


def load_reward_class(name: str) -> type[Reward]:
    """The class of a reward, by registered name or dotted path; raises as `load_reward` does."""
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
            cls = entry.load()
        else:
            module, _, attribute = name.rpartition(".")
            cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a plugin is foreign code: whatever it raises is told with its name
        origin = f" of {_distribution(entry)}" if entry is not None else ""
        raise ConfigurationError(f"reward {name!r}{origin} cannot be imported: {error!r}") from error
    if not (isinstance(cls, type) and issubclass(cls, Reward)):
        raise ConfigurationError(f"reward {name!r}: expected a subclass of lightning_fdfo.Reward, got {cls!r}")
    return cls


class RewardScores(NamedTuple):
    """A mixture's scores of a batch."""

    total: Tensor
    """[N], float32: the weighted sum"""
    terms: dict[str, Tensor]
    """name -> [N], float32: each reward's own scores, unweighted"""


@dataclass(frozen=True)
class RewardTerm:
    """One reward of a mixture."""

    reward: Reward | Callable[[Tensor, Sequence[str], Sequence[Metadata]], Tensor]
    weight: float = 1.0


class RewardMix:
    """A weighted sum of rewards.

    Args:
        terms: name -> weight, or name -> `{reward: NAME or {class_path, init_args}, weight}`, or (in Python)
            name -> RewardTerm. The short form's name is the reward's; the long form's is free, so that one class can
            come several times. Weight 0 scores and logs without training on it.

    Raises:
        ConfigurationError: nothing in it, an unknown key or reward, a weight that is no number.

    Example:
        >>> mix = RewardMix({"JPEGSize": 1.0, "again": {"reward": "JPEGSize", "weight": 0}})
        >>> scores = mix(torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])
        >>> sorted(scores.terms), bool((scores.total == scores.terms["JPEGSize"]).all())
        (['JPEGSize', 'again'], True)
    """

    def __init__(self, terms: Mapping[str, Any]) -> None:
        if not terms:
            raise ConfigurationError("rewards: expected at least one, e.g. rewards: {OCR: 1.0}, got none")
        self.terms = {name: _parse_term(name, value) for name, value in terms.items()}

    def setup(self, device: torch.device) -> None:
        """Sets up each reward."""
        for term in self.terms.values():
            if isinstance(term.reward, Reward):
                term.reward.setup(device)

    def check(self, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError if a reward cannot score this prompt."""
        for term in self.terms.values():
            if isinstance(term.reward, Reward):
                term.reward.check(prompt, metadata)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> RewardScores:
        """Scores a batch; arguments as for `Reward.__call__`.

        Raises:
            ValueError: a reward gave another shape, or a number that is not finite. A failure is never a score.
        """
        scores = {}
        for name, term in self.terms.items():
            with torch.autocast(images.device.type, enabled=False):  # a score's digits are not the trainer's to cut
                score = torch.as_tensor(term.reward(images, prompts, metadata)).detach().float().cpu()
            if score.shape != (len(images),):
                raise ValueError(f"reward {name!r}: expected [{len(images)}] scores, got shape {list(score.shape)}")
            if not bool(score.isfinite().all()):
                row = int((~score.isfinite()).nonzero()[0])
                raise ValueError(f"reward {name!r}: score {score[row].item()} for prompt {prompts[row]!r}")
            scores[name] = score
        total = sum(term.weight * scores[name] for name, term in self.terms.items() if term.weight)
        return RewardScores(total if isinstance(total, Tensor) else torch.zeros(len(images)), scores)


def _parse_term(name: str, value: Any) -> RewardTerm:
    """One entry of a mixture, short form or long."""
    if isinstance(value, RewardTerm):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return RewardTerm(load_reward(name), float(value))
    expected = f"rewards.{name}: expected a weight or {{reward: NAME or {{class_path, init_args}}, weight: NUMBER}}"
    if not isinstance(value, Mapping) or "reward" not in value or set(value) - {"reward", "weight"}:
        raise ConfigurationError(f"{expected}, got {value!r}")
    weight = value.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
        raise ConfigurationError(f"{expected}, got weight {weight!r}")
    reward = value["reward"]
    if isinstance(reward, str):
        return RewardTerm(load_reward(reward), float(weight))
    if isinstance(reward, Mapping):
        class_path, init_args = reward.get("class_path"), reward.get("init_args") or {}
        known = not set(reward) - {"class_path", "init_args"}
        if not known or not isinstance(class_path, str) or not isinstance(init_args, Mapping):
            raise ConfigurationError(f"{expected}, got reward {dict(reward)!r}")
        return RewardTerm(load_reward(class_path, **init_args), float(weight))
    if callable(reward):
        return RewardTerm(reward, float(weight))
    raise ConfigurationError(f"{expected}, got reward {reward!r}")


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
