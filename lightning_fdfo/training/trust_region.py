"""TrustRegion: an update after which the velocity would be too far from the rollout's is scaled back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lightning_fdfo.parallel import all_sum, reshard
from lightning_fdfo.rollout.points import TrajectoryPoints
from lightning_fdfo.training.protocol import TrainingModule
from lightning_fdfo.training.step import drift
from lightning_fdfo.training.trained_state import trainable

MAX_TRIES = 6
"""Shorter steps that are tried before the update is taken back."""
CLOSE = 0.7
"""Share of the bound: a step that goes so far is long enough."""


class TrustRegion:
    """Bounds how far one update may take the velocity.

        w <- w + s * step        the optimiser's step; s in (0, 1] with drift(s) <= bound

    Steps are tried from s = 1 on, until one comes to within `CLOSE` of the bound: a drift goes with a power of s, which
    is 1 at first, for a small step, and then what the last two tries say. After a drift that is not finite, a tenth of
    the step is tried. If none of `MAX_TRIES` is within the bound, s is 0: the velocity was as far before. It is the
    step that is scaled, not the gradient: an optimiser such as Adam divides a gradient's size out again.

    Args:
        bound: > 0, of the drift.
        weights: that the update changes.
        drift: measures how far the velocity is from the rollout's, the same number on each device.

    Example:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> region = TrustRegion(0.5, [weight], drift=lambda: weight.abs().item())
        >>> with region.around_update():
        ...     _ = weight.data.fill_(4.0)
        >>> round(weight.item(), 3), round(region.scale, 3)
        (0.475, 0.119)
    """

    def __init__(self, bound: float, weights: Sequence[nn.Parameter], drift: Callable[[], float]) -> None:
        self.bound = bound
        self.weights = weights
        self.drift = drift
        self.scale = 1.0
        """s of the last update."""
        self.last_drift = 0.0
        """After it."""

    @torch.no_grad()
    def _put(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        for weight, start, end in zip(self.weights, before, after, strict=True):
            weight.copy_(torch.lerp(start, end, self.scale))
        self.last_drift = self.drift()

    @contextmanager
    def around_update(self) -> Iterator[None]:
        """Opened before an update; looks at it, and scales it back, when it closes."""
        before = [weight.detach().clone() for weight in self.weights]
        yield
        self.scale, self.last_drift = 1.0, self.drift()
        if self.last_drift <= self.bound:
            return
        after = [weight.detach().clone() for weight in self.weights]
        longest, power = 0.0, 1.0
        for _ in range(MAX_TRIES):
            scale, drift = self.scale, self.last_drift
            aimed = (0.95 * self.bound / max(drift, 1e-12)) ** (1 / power) if math.isfinite(drift) else 0.1
            self.scale = min(scale * aimed, 1.0)
            self._put(before, after)
            if self.last_drift <= self.bound:
                longest = max(longest, self.scale)
                if self.last_drift >= CLOSE * self.bound:
                    break
            power = _power(scale, drift, self.scale, self.last_drift)
        if self.scale != longest:
            self.scale = longest
            self._put(before, after)


def _power(scale: float, drift: float, other_scale: float, other_drift: float) -> float:
    """The p of drift ~ s^p through two points; 1 where they say nothing."""
    known = all(0 < number < math.inf for number in (scale, drift, other_scale, other_drift))
    if not known or scale == other_scale:
        return 1.0
    return min(max(math.log(drift / other_drift) / math.log(scale / other_scale), 0.25), 4.0)


@contextmanager
def within_trust_region(module: TrainingModule) -> Iterator[None]:
    """Opened around an optimiser's step: bounds it as `objective.trust_region` says, and logs what it did.

    `train/step_drift` is the drift after the step, `train/step_scale` is s. A LoRA's dropout, which belongs to the
    training forward alone, is off for the measurement, as it was in the rollout.
    """
    bound = module.objective.trust_region
    if bound is None:
        yield
        return
    transformer = module.flow.transformer
    region = TrustRegion(bound, list(trainable(transformer).values()), partial(_drift, module))
    with region.around_update():
        yield
    module.log_means({"train/step_scale": region.scale, "train/step_drift": region.last_drift}, 1)


@torch.no_grad()
def _drift(module: TrainingModule) -> float:
    batch = cast(TrajectoryPoints, module.batch)
    module.dropout.switch(False)
    with module.trainer.precision_plugin.forward_context():
        velocity = module.velocity(batch)
    reshard(module.flow.transformer)
    return drift(velocity, batch.old_velocity, partial(all_sum, module.trainer)).item()
