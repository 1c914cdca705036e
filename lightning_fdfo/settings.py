"""The groups of settings that FDFOModule takes; each checks that its numbers are finite and in range."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.objective import Normalization
from lightning_fdfo.schedules import ChurnSchedule


def check_number(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raises ConfigurationError unless a setting is a finite number in its range.

    Args:
        name: of the setting, as a configuration names it.
        value: its value.
        above: it must be larger than this.
        at_least: it must not be smaller than this.
        below: it must be smaller than this.

    Raises:
        ConfigurationError: it is NaN, infinite or out of range.

    Example:
        >>> check_number("sampling.churn", 0.1, at_least=0)
        >>> check_number("sampling.churn", float("nan"), at_least=0)
        Traceback (most recent call last):
        ...
        lightning_fdfo.errors.ConfigurationError: sampling.churn: expected a finite number of at least 0, got nan
    """
    if math.isfinite(value) and above < value < below and value >= at_least:
        return
    bounds = [(above, "above"), (at_least, "of at least"), (below, "below")]
    said = " and ".join(f"{word} {bound:g}" for bound, word in bounds if math.isfinite(bound))
    raise ConfigurationError(f"{name}: expected a finite number{' ' * bool(said)}{said}, got {value}")


@dataclass(frozen=True)
class Batching:
    """The size of an epoch and of its forward passes. Counts of pairs and updates are totals over all devices.

    Args:
        num_pairs: pairs per epoch, over all devices.
        updates_per_epoch: optimiser steps per epoch; with 1, `objective.clip_range` has no effect.
        num_points_per_pair: points of a pair that are trained on, stratified in time; None for all 2T.
        batch_size: points per forward in training, on each device, at most: the largest number up to it that divides an
            update's points on a device is taken. Sets memory only.
        rollout_batch_size: pairs per forward in a rollout, on each device; sets memory only.
        pairs_per_prompt: pairs of an epoch with the same prompt, each from latents of its own; divides `num_pairs`.

    Raises:
        ConfigurationError: a count below 1, or `pairs_per_prompt` that does not divide. Which other counts divide which
            is checked by `BatchPlan`.
    """

    num_pairs: int = 432
    updates_per_epoch: int = 4
    num_points_per_pair: int | None = None
    batch_size: int = 8
    rollout_batch_size: int = 8
    pairs_per_prompt: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(f"batching.{name}", 1 if value is None else value, at_least=1)
        if self.num_pairs % self.pairs_per_prompt:
            raise ConfigurationError(
                f"batching.pairs_per_prompt: expected a divisor of num_pairs {self.num_pairs}, got "
                f"{self.pairs_per_prompt}"
            )


@dataclass(frozen=True)
class FailurePolicy:
    """Which failures a run survives.

    Args:
        on_reward_error: `raise` stops the run and names reward, prompt and pair; `drop_pair` leaves the pair out of
            training, whose gradient keeps its scale, and of all numbers.
        max_dropped: share of an epoch's pairs that may be dropped before the run stops, in [0, 1).
        max_skipped: >= 0; updates in a row that may be skipped because their gradient is not finite.

    Raises:
        ConfigurationError: a number out of its range, or not finite.
    """

    on_reward_error: Literal["raise", "drop_pair"] = "raise"
    max_dropped: float = 0.1
    max_skipped: int = 3

    def __post_init__(self) -> None:
        check_number("failures.max_dropped", self.max_dropped, at_least=0, below=1)
        check_number("failures.max_skipped", self.max_skipped, at_least=0)

    @property
    def drops_pairs(self) -> bool:
        """Whether a pair whose reward fails is left out, and the run goes on."""
        return self.on_reward_error == "drop_pair"


@dataclass(frozen=True)
class Evaluation:
    """What validation and `test` compute beside rewards and image statistics; its steps; how often drift is measured.

    Args:
        metrics: rewards that are scored in validation and `test` only, in the form of `rewards`; their weights mean
            nothing.
        base: `test` also generates with the base model, from the same latents: its numbers, the differences, and win
            rates. Where the whole transformer was trained, the base's weights wait on the CPU.
        diversity: what embeds images, to tell how far those of a prompt are from each other: any CLIP of transformers,
            a hub name or a folder, such as `openai/clip-vit-large-patch14`; or `dreamsim`, if that package is
            installed. None leaves diversity out.
        confidence: of the win rates' intervals, in (0, 1).
        num_resamples: of their bootstrap.
        drift_every: epochs from one measurement of `train/drift` to the next; the first is in epoch 0. Each takes a
            forward of the base model at the epoch's first batch.
        num_steps: of the sampler, in validation, `test` and `predict`, and in what an export says; None takes
            `sampling.num_steps`. Rollouts may take fewer steps, and cost less, than good images need: it is
            the same velocity that they train.

    Raises:
        ConfigurationError: a setting out of its range.
    """

    metrics: dict[str, Any] | None = None
    base: bool = True
    diversity: str | None = None
    confidence: float = 0.95
    num_resamples: int = 9999
    drift_every: int = 1
    num_steps: int | None = None

    def __post_init__(self) -> None:
        check_number("evaluation.num_steps", 1 if self.num_steps is None else self.num_steps, at_least=1)
        check_number("evaluation.drift_every", self.drift_every, at_least=1)
        if not 0 < self.confidence < 1 or self.num_resamples < 1:
            raise ConfigurationError(f"evaluation: expected 0 < confidence < 1 and num_resamples >= 1, got {self}")

    def sampling(self, rollouts: Sampling) -> Sampling:
        """How images are sampled that are not trained on: as in rollouts, but for their own number of steps.

        Example:
            >>> Evaluation(num_steps=40).sampling(Sampling(num_steps=10)).num_steps
            40
        """
        return rollouts if self.num_steps is None else replace(rollouts, num_steps=self.num_steps)


@dataclass(frozen=True)
class Objective:
    """Settings of the objective.

    Args:
        clip_range: > 0; how far a ratio may leave 1 before it is pulled back. With `updates_per_epoch: 1` it has no
            effect: the ratio of an epoch's first update is 1, but for rounding and a LoRA's dropout.
        normalization: of the direction: `mean_square` as published, or the steadier `root_mean_square`.
        kl_weight: >= 0; weight of mean((v - v_base)^2), with v_base from the model without its LoRA.
        kl_target: > 0; a `train/drift` that the run is to keep near. The weight then starts as `kl_weight`, is doubled
            before the updates of an epoch whose drift is above 1.5 times the target, and halved where it is below the
            target / 1.5, between an eighth and 64 times of what it was. None keeps the weight.
        reward_scale: what a pair's half difference of the total is divided by before it trains: `none` (1), or `std`,
            the running standard deviation over all pairs so far. With `std` a clip means the same for every mixture.
            Gradients of terms with `gradient: true` are divided by the same; where no other term has a weight, by 1.
        reward_clip: > 0; bounds the half difference of the total, after `reward_scale`: a pair that differs by far
            more than others then weighs no more than so much. None does not.
        trust_region: > 0; after an update the velocity may differ from the rollout's by so much of its size,
            rms(v - v_rollout) / rms(v_rollout), at the points of the update's last batch. A longer step is scaled
            back until it does not. None lets every step be as long as the optimiser's. Takes a forward an update.

    Raises:
        ConfigurationError: a number out of its range, or not finite; a `kl_target` without a `kl_weight` to start from.
    """

    clip_range: float = 0.03
    normalization: Normalization = "mean_square"
    kl_weight: float = 0.0
    kl_target: float | None = None
    reward_scale: Literal["none", "std"] = "none"
    reward_clip: float | None = None
    trust_region: float | None = None

    def __post_init__(self) -> None:
        check_number("objective.clip_range", self.clip_range, above=0)
        check_number("objective.kl_weight", self.kl_weight, at_least=0)
        for name in ("kl_target", "reward_clip", "trust_region"):
            if getattr(self, name) is not None:
                check_number(f"objective.{name}", getattr(self, name), above=0)
        if self.reward_scale not in ("none", "std"):
            raise ConfigurationError(f"objective.reward_scale: expected none or std, got {self.reward_scale!r}")
        if self.kl_target is not None and not self.kl_weight:
            raise ConfigurationError(
                f"objective.kl_target: expected a kl_weight above 0 to start from, e.g. 0.1, got kl_target "
                f"{self.kl_target} with kl_weight {self.kl_weight}"
            )


@dataclass(frozen=True)
class Sampling:
    """How images are sampled, in rollouts and in validation.

    Args:
        num_steps: T, steps of the sampler; `evaluation.num_steps` may have others.
        height: of an image, pixels.
        width: of an image, pixels.
        churn: share of noise renewed at each step of a rollout; 0.0025 is the paper's. Validation has none. A number,
            or a schedule over the noise level by its class: `Interval`, `Prior`, `AdaptiveChurn` or one of your own.
        initial_churn: the same for the initial latents, a number; None takes `churn`.
        guidance_scale: 1 is without guidance, as in the paper; what else it means is the flow's `guidance`.
        store: of a rollout's velocities until they are trained on. `bfloat16` takes half of their memory and rounds
            them by at most 1 part in 256; where the flow computes in bfloat16, without guidance, it changes nothing.
        antithetic: the two branches of a pair draw the same fresh noise with opposite signs, in the initial latents
            and in every step. Each branch alone is sampled as before; the pair's middle is the trajectory without
            fresh noise, up to terms of the churn's own size, and so half differences are central differences about it.
            For the same churn the images are further apart.

    Raises:
        ConfigurationError: a count or size below 1, a negative churn, or a number that is not finite.
    """

    num_steps: int = 40
    height: int = 512
    width: int = 512
    churn: float | ChurnSchedule = 0.0025
    initial_churn: float | None = None
    guidance_scale: float = 1.0
    store: Literal["float32", "bfloat16"] = "float32"
    antithetic: bool = False

    def __post_init__(self) -> None:
        if self.store not in ("float32", "bfloat16"):
            raise ConfigurationError(f"sampling.store: expected float32 or bfloat16, got {self.store!r}")
        for name in ("num_steps", "height", "width"):
            check_number(f"sampling.{name}", getattr(self, name), at_least=1)
        if not isinstance(self.churn, ChurnSchedule):
            check_number("sampling.churn", self.churn, at_least=0)
        check_number("sampling.initial_churn", self.initial_churn or 0, at_least=0)
        check_number("sampling.guidance_scale", self.guidance_scale)

    @property
    def store_dtype(self) -> torch.dtype:
        """The dtype that `store` names."""
        return torch.bfloat16 if self.store == "bfloat16" else torch.float32
