"""A term of a mixture: one reward, with its weight, scale, clip, gate, device and time limit.

In a configuration a term has a short or a long form:

    rewards:
      OCR: 1.0                                                    # short: the reward's name, and its weight
      small:                                                      # long: a name of your own
        reward: {class_path: JPEGSize, init_args: {sign: -1}}     # or a name, if it takes no options
        weight: {0: 1.0, 20: 0.3}                                 # by epoch; or a number
        scale: std
        clip: 3
        gate: {reward: OCR, above: -0.5}
        device: cpu
        time_limit: 60
        gradient: false                                           # true: by the reward's own gradient
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.base import BaseReward, PairReward, Scorer
from lightning_fdfo.reward.registry import did_you_mean, load_reward

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
        gradient: trains by the gradient of the score at the final latents, through the decoder, instead of the pair's
            half difference: exact, and the same for all steps, as the half difference is. For rewards that are
            `differentiable`; it takes a backward pass of decoder and reward for each image. There is nothing to clip.

    Example:
        >>> term = RewardTerm(lambda images, prompts, metadata: images.mean(dim=(1, 2, 3)), {0: 1.0, 20: 0.5})
        >>> [term.weight_at(epoch) for epoch in (0, 10, 20, 100)]
        [1.0, 0.75, 0.5, 0.5]
    """

    reward: BaseReward | Scorer
    weight: Weight = 1.0
    scale: Scale = "none"
    device: str | None = None
    clip: float | None = None
    gate: Gate | None = None
    time_limit: float | None = None
    gradient: bool = False

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


KEYS = tuple(field.name for field in fields(RewardTerm))
"""Of the long form."""


def parse_terms(terms: Mapping[str, Any]) -> dict[str, RewardTerm]:
    """A mixture's terms, from the short form, the long form, or as RewardTerms.

    Raises:
        ConfigurationError: no term, an unknown key or reward, a value that makes no sense, a gate that leads to no
            other term or to one with a gate.

    Example:
        >>> parse_terms({"small": {"reward": "JPEGSize", "weight": {0: 1, 20: 0.3}, "clip": 3}})["small"].clip
        3.0
    """
    if not terms:
        raise ConfigurationError("rewards: expected at least one, e.g. rewards: {OCR: 1.0}, got none")
    parsed = {name: _checked(name, _parse_term(name, value)) for name, value in terms.items()}
    for name, term in parsed.items():
        if term.gate is not None:
            _check_gate(name, term.gate, parsed)
    return parsed


# Forms


def _parse_term(name: str, value: Any) -> RewardTerm:
    """A term, its values as they were given."""
    if isinstance(value, RewardTerm):
        return replace(value, gate=_load_gate(value.gate))
    if _is_number(value):
        return RewardTerm(_load_short(name), value)
    expected = f"rewards.{name}: expected a weight or {{reward: NAME or {{class_path, init_args}}, weight: NUMBER}}"
    unknown = [key for key in value if key not in KEYS] if isinstance(value, Mapping) else []
    if not isinstance(value, Mapping) or "reward" not in value or unknown:
        got = f"the key {unknown[0]!r}{did_you_mean(str(unknown[0]), KEYS)}" if unknown else repr(value)
        raise ConfigurationError(f"{expected}, and maybe scale, clip, gate, device, time_limit and gradient, got {got}")
    return RewardTerm(**{**value, "reward": _load(value["reward"], expected), "gate": _load_gate(value.get("gate"))})


def _load_short(name: str) -> BaseReward:
    """The reward that a short form names."""
    try:
        return load_reward(name)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"rewards.{name}: {error}; under a name of your own: {{reward: NAME, weight: NUMBER}}"
        ) from error


def _load(reward: Any, expected: str) -> BaseReward | Scorer:
    """The reward that a long form names, with its options; in Python it may be there already."""
    spec = {"class_path": reward} if isinstance(reward, str) else reward
    match spec:
        case {"class_path": str(name), **rest} if set(rest) <= {"init_args"}:
            options = rest.get("init_args") or {}
            if isinstance(options, Mapping):
                return load_reward(name, **options)
        case _ if callable(reward):
            return reward  # type: ignore[no-any-return]
    raise ConfigurationError(f"{expected}, got reward {reward!r}")


def _load_gate(gate: Any) -> Any:
    """A Gate of a mapping with its keys; anything else as it is, to be refused with the other values."""
    try:
        return Gate(**gate) if isinstance(gate, Mapping) else gate
    except TypeError:  # a missing key, or another one
        return gate


# Values


def _checked(name: str, term: RewardTerm) -> RewardTerm:
    """The term, its numbers as floats; raises ConfigurationError for a value that makes no sense."""
    for key, (makes_sense, expected) in _VALUES.items():
        if not makes_sense(value := getattr(term, key)):
            raise ConfigurationError(f"rewards.{name}: expected {expected} {value!r}")
    if term.gradient:
        _check_gradient(name, term)
    return replace(term, **{key: _as_floats(getattr(term, key)) for key in ("weight", "scale", "clip", "time_limit")})


def _check_gradient(name: str, term: RewardTerm) -> None:
    """Raises ConfigurationError for a term that cannot train by its gradient."""
    if not getattr(term.reward, "differentiable", False):
        what = getattr(term.reward, "name", None) or getattr(term.reward, "__name__", type(term.reward).__name__)
        raise ConfigurationError(
            f"rewards.{name}: gradient: true needs a reward that is differentiable, and {what} is not (or does not say "
            "so, by `differentiable = True`): leave gradient out, and it trains by the differences of pairs"
        )
    if term.clip is not None:
        raise ConfigurationError(f"rewards.{name}: expected no clip with gradient: true, got clip {term.clip}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_positive_or_none(value: Any) -> bool:
    return value is None or _is_positive(value)


def _is_weight(weight: Any) -> bool:
    if not isinstance(weight, Mapping):
        return _is_number(weight)
    epochs = all(type(epoch) is int and epoch >= 0 for epoch in weight)
    return bool(weight) and epochs and all(map(_is_number, weight.values()))


def _is_gate(gate: Any) -> bool:
    if gate is None:
        return True
    if not isinstance(gate, Gate) or not isinstance(gate.reward, str):
        return False
    bounds = (gate.above, gate.below)
    numbers = all(type(bound) in (int, float) for bound in bounds)
    return numbers and gate.above < gate.below and bounds != (-math.inf, math.inf)


def _is_device(device: Any) -> bool:
    try:
        torch.device(device or "cpu")
    except (RuntimeError, TypeError):
        return False
    return True


_VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "weight": (_is_weight, "a number as weight, or one for some epochs, with straight lines between them, as "
               "{0: 1.0, 20: 0.3}, got weight"),
    "scale": (lambda scale: scale in ("none", "std") or _is_positive(scale),
              "scale none, std or a number above 0, got scale"),
    "clip": (_is_positive_or_none, "clip null or a number above 0, got clip"),
    "gate": (_is_gate, "a gate like {reward: OCR, above: 0.8}, with above, below, or both with above the smaller, got"),
    "device": (_is_device, "a device like cpu or cuda:1, got"),
    "gradient": (lambda gradient: isinstance(gradient, bool), "gradient true or false, got gradient"),
    "time_limit": (_is_positive_or_none, "time_limit null or seconds above 0, got time_limit"),
}  # fmt: skip
"""Key of a term -> whether a value makes sense, and what is expected."""


def _as_floats(value: Any) -> Any:
    """Numbers as floats, of a schedule too; the rest as it is."""
    if isinstance(value, Mapping):
        return {epoch: float(number) for epoch, number in value.items()}
    return float(value) if _is_number(value) else value


def _check_gate(name: str, gate: Gate, terms: Mapping[str, RewardTerm]) -> None:
    """Raises ConfigurationError for a gate on a term that is not there, or that has a gate itself."""
    pairs = [other for other, term in terms.items() if isinstance(term.reward, PairReward)]
    others = sorted(other for other, term in terms.items() if term.gate is None and other not in pairs)
    if gate.reward not in others:
        problem = "has a gate itself" if gate.reward in terms else "is not in the mixture"
        if gate.reward in pairs:
            problem = "compares two images, and gives none of them a score"
        raise ConfigurationError(
            f"rewards.{name}: expected a gate on a term without one, of {', '.join(others) or 'which there is none'}; "
            f"{gate.reward!r} {problem} (a term with weight 0 is scored, and can be a gate)"
        )
