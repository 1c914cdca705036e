"""One reward of a mixture: what it is, what it weighs in each epoch, and when it counts; how a configuration says so.

OCR: 1.0                                                    # short form, NAME: weight
small:                                                      # long form, under a name of one's own
reward: {class_path: JPEGSize, init_args: {sign: -1}}
weight: {0: 1.0, 20: 0.3}                                 # by epoch
scale: std
clip: 3
gate: {reward: OCR, above: -0.5}
device: cpu
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.base import Reward, Scorer
from lightning_fdfo.reward.registry import load_reward

Scale = float | Literal["none", "std"]
Weight = float | Mapping[int, float]
"""A number, or a schedule: epoch -> weight."""


@dataclass(frozen=True)
class Gate:
    """Lets a term count only for pairs of which both branches have such a score under another term.

    Args:
        reward: the other term's name.
        above: its score must be above, in its own units: not scaled, not weighed.
        below: its score must be below.
    """

    reward: str
    above: float = -math.inf
    below: float = math.inf


@dataclass(frozen=True)
class RewardTerm:
    """One reward of a mixture.

    Args:
        reward: a reward, or a plain function of images, prompts and metadata.
        weight: finite; 0 scores and logs without training on it. Or a schedule, {epoch: weight}: straight lines
            between the epochs that are named, the first and the last weight before and after them.
        scale: what a score is divided by before it is weighed: `none` (1), a number > 0, or `std`, the running standard
            deviation of this reward's half differences over all pairs so far that it has scored.
        device: where it runs; None takes the reward's own, else the flow's.
        clip: > 0; bounds a pair's half difference, after the scale and before the weight; None does not.
        gate: for which pairs it counts; None for all.
        time_limit: > 0; seconds that scoring one batch may take, after which the reward has failed; None: no limit.

    Example:
        >>> term = RewardTerm(lambda images, prompts, metadata: images.mean(dim=(1, 2, 3)), {0: 1.0, 20: 0.5})
        >>> [term.weight_at(epoch) for epoch in (0, 10, 20, 100)]
        [1.0, 0.75, 0.5, 0.5]
    """

    reward: Reward | Scorer
    weight: Weight = 1.0
    scale: Scale = "none"
    device: str | None = None
    clip: float | None = None
    gate: Gate | None = None
    time_limit: float | None = None

    def weight_at(self, epoch: int) -> float:
        """Its weight in an epoch: a function of the epoch alone."""
        if not isinstance(self.weight, Mapping):
            return self.weight
        epochs = sorted(self.weight)
        return float(np.interp(epoch, epochs, [self.weight[key] for key in epochs]))

    @property
    def is_watched(self) -> bool:
        """Whether it is scored and logged only, in all epochs."""
        return not any(self.weight.values() if isinstance(self.weight, Mapping) else [self.weight])


KEYS = {"reward", "weight", "scale", "device", "clip", "gate", "time_limit"}
"""Of the long form."""


def parse_terms(terms: Mapping[str, Any]) -> dict[str, RewardTerm]:
    """A mixture's entries, in the short form, the long form, or as they come from Python.

    Raises:
        ConfigurationError: nothing in it, an unknown key or reward, a value that makes no sense, a gate that leads
            to no other term or to one with a gate.
    """
    if not terms:
        raise ConfigurationError("rewards: expected at least one, e.g. rewards: {OCR: 1.0}, got none")
    parsed = {name: _parse_term(name, value) for name, value in terms.items()}
    for name, term in parsed.items():
        if term.gate is not None:
            _check_gate(name, term.gate, parsed)
    return parsed


def _parse_term(name: str, value: Any) -> RewardTerm:
    expected = f"rewards.{name}: expected a weight or {{reward: NAME or {{class_path, init_args}}, weight: NUMBER}}"
    if isinstance(value, RewardTerm):
        return _checked(name, value)
    if _is_number(value):
        return RewardTerm(_load(name), float(value))
    if not isinstance(value, Mapping) or "reward" not in value or set(value) - KEYS:
        raise ConfigurationError(f"{expected}, and maybe scale, clip, gate, device and time_limit, got {value!r}")
    reward = value["reward"]
    if isinstance(reward, str):
        reward = load_reward(reward)
    elif isinstance(reward, Mapping):
        class_path, init_args = reward.get("class_path"), reward.get("init_args") or {}
        known = not set(reward) - {"class_path", "init_args"}
        if not known or not isinstance(class_path, str) or not isinstance(init_args, Mapping):
            raise ConfigurationError(f"{expected}, got reward {dict(reward)!r}")
        reward = load_reward(class_path, **init_args)
    elif not callable(reward):
        raise ConfigurationError(f"{expected}, got reward {reward!r}")
    return _checked(name, RewardTerm(**{**value, "reward": reward}))


def _load(name: str) -> Reward:
    """The reward of a short form."""
    try:
        return load_reward(name)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"rewards.{name}: {error}; under a name of your own: {{reward: NAME, weight: NUMBER}}"
        ) from error


def _checked(name: str, term: RewardTerm) -> RewardTerm:
    """The term, its numbers as floats; raises ConfigurationError for what makes no sense."""
    if term.scale not in ("none", "std") and not _is_positive(term.scale):
        raise ConfigurationError(
            f"rewards.{name}: expected scale none, std or a number above 0, got scale {term.scale!r}"
        )
    if term.clip is not None and not _is_positive(term.clip):
        raise ConfigurationError(f"rewards.{name}: expected clip null or a number above 0, got clip {term.clip!r}")
    if term.time_limit is not None and not _is_positive(term.time_limit):
        raise ConfigurationError(
            f"rewards.{name}: expected time_limit null or seconds above 0, got time_limit {term.time_limit!r}"
        )
    try:
        torch.device(term.device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"rewards.{name}: expected a device like cpu or cuda:1, got {term.device!r}"
        ) from error
    return replace(
        term,
        weight=_parse_weight(name, term.weight),
        scale=term.scale if term.scale in ("none", "std") else float(term.scale),
        clip=None if term.clip is None else float(term.clip),
        time_limit=None if term.time_limit is None else float(term.time_limit),
        gate=_parse_gate(name, term.gate),
    )


def _parse_weight(name: str, weight: Any) -> Weight:
    if _is_number(weight):
        return float(weight)
    if isinstance(weight, Mapping) and weight:
        epochs = all(type(epoch) is int and epoch >= 0 for epoch in weight)
        if epochs and all(_is_number(value) for value in weight.values()):
            return {epoch: float(value) for epoch, value in weight.items()}
    raise ConfigurationError(
        f"rewards.{name}: expected a number as weight, or one for some epochs, with straight lines between them, as "
        f"{{0: 1.0, 20: 0.3}}, got weight {weight!r}"
    )


def _parse_gate(name: str, gate: Any) -> Gate | None:
    if gate is None:
        return None
    given = vars(gate) if isinstance(gate, Gate) else gate
    try:
        parsed = Gate(**given)
        bounds = (parsed.above, parsed.below)
        well = isinstance(parsed.reward, str) and parsed.above < parsed.below and bounds != (-math.inf, math.inf)
    except TypeError:  # no mapping, another key, or a bound that is no number
        well = False
    if not well or not all(type(bound) in (int, float) for bound in bounds):
        raise ConfigurationError(
            f"rewards.{name}: expected a gate like {{reward: OCR, above: 0.8}}, with above, below, or both with above "
            f"the smaller, got {gate!r}"
        )
    return parsed


def _check_gate(name: str, gate: Gate, terms: Mapping[str, RewardTerm]) -> None:
    others = sorted(other for other, term in terms.items() if term.gate is None)
    if gate.reward not in others:
        problem = "has a gate itself" if gate.reward in terms else "is not in the mixture"
        raise ConfigurationError(
            f"rewards.{name}: expected a gate on a term without one, of {', '.join(others) or 'which there is none'}; "
            f"{gate.reward!r} {problem} (a term with weight 0 is scored, and can be a gate)"
        )


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
