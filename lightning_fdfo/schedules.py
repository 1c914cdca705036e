"""Grids of noise levels and of churn.

A grid is a float32 tensor `sigmas` [T+1] that falls from 1 to 0; a churn schedule is a float32 tensor [T+1] whose
entry 0 belongs to the initial latents and whose entry k belongs to the step that lands on sigmas[k].

Left out: a model's own grid. `FlowModel.sigmas` takes that from the model's scheduler.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError


def uniform_sigmas(num_steps: int, *, shift: float = 1.0) -> Tensor:
    """A uniform grid, pushed toward the noise by `shift`.

        sigma -> shift * sigma / (1 + (shift - 1) * sigma)

    Args:
        num_steps: T >= 1.
        shift: > 0; 1 leaves the grid uniform, 3 is what SD3 uses at a megapixel.

    Returns:
        float32 [T+1], from 1 to 0.

    Raises:
        ValueError: num_steps < 1 or shift <= 0.

    Example:
        >>> uniform_sigmas(4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
        >>> uniform_sigmas(4, shift=3.0)
        tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000])

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"expected num_steps >= 1 and shift > 0, got num_steps={num_steps}, shift={shift}")
    sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * sigmas / (1 + (shift - 1) * sigmas)).float()


def churn_schedule(churn: float, num_steps: int, *, initial_churn: float | None = None) -> Tensor:
    """The same churn at every step, and its own at the start.

    Args:
        churn: >= 0, at every step.
        num_steps: T >= 1.
        initial_churn: >= 0, for the initial latents; None means `churn`.

    Returns:
        float32 [T+1]. Entry T is 0: the step that lands on sigma = 0 has no noise left to replace.

    Raises:
        ValueError: a negative churn or num_steps < 1.

    Example:
        >>> churn_schedule(0.5, 3, initial_churn=0.25)
        tensor([0.2500, 0.5000, 0.5000, 0.0000])
    """
    initial = churn if initial_churn is None else initial_churn
    if num_steps < 1 or churn < 0 or initial < 0:
        raise ValueError(f"expected num_steps >= 1 and churn >= 0, got {num_steps=}, {churn=}, {initial_churn=}")
    return torch.tensor([initial, *[churn] * (num_steps - 1), 0.0], dtype=torch.float32)


class ChurnSchedule(ABC):
    """How much noise is renewed at each noise level; a class of your own may be named in a configuration.

    Noise that is renewed at a high sigma makes the two images of a pair differ in layout and shapes, at a low one in
    texture. A reward that looks at one of them learns from less noise if the pairs differ there.
    """

    @abstractmethod
    def __call__(self, sigmas: Tensor) -> Tensor:
        """The churn of steps that land on these noise levels: [N] in [0, 1] -> [N], >= 0; at 1, of initial latents."""


@dataclass(frozen=True)
class Interval(ChurnSchedule):
    """Churn between two noise levels, and none elsewhere; the edges may be soft.

        churn * clip(1 - max(low - sigma, sigma - high, 0) / softness, 0, 1)

    Args:
        churn: >= 0, between the two.
        low: in [0, 1].
        high: in (low, 1].
        softness: >= 0; over so much of sigma, outside of the two, it falls to 0.

    Raises:
        ConfigurationError: a number out of its range.

    Example:
        >>> Interval(0.5, low=0.5, high=0.75, softness=0.5)(uniform_sigmas(4))
        tensor([0.2500, 0.5000, 0.5000, 0.2500, 0.0000])

    Source: the idea of an interval is that of Kynkäänniemi et al. 2024 (arXiv 2404.07724), who guide in one alone.
    """

    churn: float
    low: float
    high: float
    softness: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high <= 1 and 0 <= self.churn < math.inf and 0 <= self.softness < math.inf):
            raise ConfigurationError(
                f"sampling.churn: expected an Interval with 0 <= low < high <= 1, churn and softness >= 0, got {self}"
            )

    def __call__(self, sigmas: Tensor) -> Tensor:
        """The churn at each noise level: [N] -> [N]."""
        outside = torch.maximum(self.low - sigmas, sigmas - self.high).clamp(min=0)
        outside = torch.where(outside < 1e-6, 0.0, outside)  # a grid's 0.7 is float32's, and so a little less
        return self.churn * (1 - outside / max(self.softness, 1e-6)).clamp(min=0)


@dataclass(frozen=True)
class Prior(ChurnSchedule):
    """Churn as a normal density over the noise level's logit, the shape of the levels that flow models train on.

        churn * exp(-(logit(sigma) - mean)^2 / (2 * std^2))        logit(sigma) = log(sigma / (1 - sigma))

    It is `churn` at its largest, and 0 at sigma = 1, so that initial latents keep all their noise.

    Args:
        churn: >= 0.
        mean: of the logit; 0 is sigma = 1/2, 1 is 0.73, 2 is 0.88.
        std: > 0, of the logit.

    Raises:
        ConfigurationError: a number out of its range.

    Example:
        >>> Prior(0.5)(uniform_sigmas(4))
        tensor([0.0000, 0.2735, 0.5000, 0.2735, 0.0000])

    Source: the density is that of Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 19.
    """

    churn: float
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.churn < math.inf and math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ConfigurationError(f"sampling.churn: expected a Prior with churn >= 0 and std > 0, got {self}")

    def __call__(self, sigmas: Tensor) -> Tensor:
        """The churn at each noise level: [N] -> [N]."""
        return self.churn * torch.exp(-((torch.logit(sigmas) - self.mean) ** 2) / (2 * self.std**2))


@dataclass(frozen=True)
class AdaptiveChurn(ChurnSchedule):
    """Another churn times a factor, which is moved after each epoch so that pairs stay as far apart as they should.

        factor_next = min(factor * clip((target_distance / distance)^2, 1/2, 2), max_factor)

    The distance is `rollout/pair_distance`; it grows with the square root of a small churn. The factor is 1 in epoch 0,
    logged as `rollout/churn_factor`, and part of each checkpoint. A flow that makes all images of a prompt alike cannot
    be brought to any distance: `max_factor` is where that ends.

    Args:
        target_distance: > 0, root mean square of the half difference of a pair's final latents.
        churn: what is multiplied: a number, or another schedule.
        max_factor: >= 1.

    Raises:
        ConfigurationError: a number out of its range, or an adaptive churn in another.

    Example:
        >>> churn = AdaptiveChurn(target_distance=0.2, churn=0.05)
        >>> churn.next_factor(1.0, distance=0.25), churn.next_factor(1.0, distance=0.0)
        (0.6400000000000001, 2.0)
    """

    target_distance: float
    churn: float | ChurnSchedule = 0.0025
    max_factor: float = 8.0

    def __post_init__(self) -> None:
        inner = 0.0 if isinstance(self.churn, ChurnSchedule) else self.churn
        nested = isinstance(self.churn, AdaptiveChurn)
        finite = 0 < self.target_distance < math.inf and 0 <= inner < math.inf and 1 <= self.max_factor < math.inf
        if nested or not finite:
            raise ConfigurationError(
                "sampling.churn: expected an AdaptiveChurn with target_distance > 0, max_factor >= 1 and a churn >= 0 "
                f"that is not adaptive itself, got {self}"
            )

    def __call__(self, sigmas: Tensor) -> Tensor:
        """What is multiplied, at each noise level: [N] -> [N]."""
        return self.churn(sigmas) if isinstance(self.churn, ChurnSchedule) else torch.full_like(sigmas, self.churn)

    def next_factor(self, factor: float, distance: float) -> float:
        """The factor after an epoch whose pairs were so far apart."""
        wanted = (self.target_distance / distance) ** 2 if distance else math.inf
        return min(factor * min(max(wanted, 0.5), 2.0), self.max_factor)


def churns_on(sigmas: Tensor, churn: float | ChurnSchedule, *, initial_churn: float | None = None) -> Tensor:
    """The churn of each step on a grid.

    Args:
        sigmas: [T+1], from 1 to 0.
        churn: a number >= 0 for all steps, or a schedule.
        initial_churn: >= 0, for the initial latents; None takes the number, or what the schedule has at sigma = 1.

    Returns:
        float32 [T+1]. Entry T is 0.

    Raises:
        ConfigurationError: a schedule gives another number of churns, or one that is negative or not finite.

    Example:
        >>> churns_on(uniform_sigmas(4), 0.5)
        tensor([0.5000, 0.5000, 0.5000, 0.5000, 0.0000])
        >>> churns_on(uniform_sigmas(4), Interval(0.5, low=0.5, high=0.8), initial_churn=0.1)
        tensor([0.1000, 0.5000, 0.5000, 0.0000, 0.0000])
    """
    if not isinstance(churn, ChurnSchedule):
        return churn_schedule(churn, len(sigmas) - 1, initial_churn=initial_churn)
    churns = churn(sigmas.clone()).float()
    if churns.shape != sigmas.shape or not bool(((churns >= 0) & churns.isfinite()).all()):
        raise ConfigurationError(
            f"sampling.churn: expected {type(churn).__name__} to give a finite number >= 0 for each of {len(sigmas)} "
            f"noise levels, got {churns.tolist()}"
        )
    churns[-1] = 0.0
    if initial_churn is not None:
        churns[0] = initial_churn
    return churns


def check_sigmas(sigmas: Tensor) -> None:
    """Raises ValueError unless `sigmas` is a grid [T+1] that falls strictly from 1 to 0.

    Example:
        >>> check_sigmas(uniform_sigmas(3))
        >>> check_sigmas(torch.tensor([1.0, 0.5]))
        Traceback (most recent call last):
        ...
        ValueError: expected sigmas [T+1] that fall strictly from 1 to 0, got [1.0, 0.5]
    """
    falls = sigmas.ndim == 1 and len(sigmas) > 1 and bool((sigmas.diff() < 0).all())
    if not falls or sigmas[0] != 1 or sigmas[-1] != 0:
        raise ValueError(f"expected sigmas [T+1] that fall strictly from 1 to 0, got {sigmas.tolist()}")
