"""Settings by which no weight would change: refused before a model is loaded.

A pair teaches by the difference of its two scores. With no weight on a reward, no churn or no learning rate nothing
would train, and a run would end as it began, without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from lightning_fdfo.checkpoints.replayed_scheduler import replayed
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.schedules import ChurnSchedule, churns_on, uniform_sigmas
from lightning_fdfo.settings import Sampling
from lightning_fdfo.training.optimizer_settings import optimizer_groups
from lightning_fdfo.training.optimizers import build_optimizer
from lightning_fdfo.training.protocol import TrainingModule

MAX_STEPS = 10_000
"""Of a scheduler that are looked at."""


def cannot_learn(module: TrainingModule, max_epochs: int | None) -> list[str]:
    """Settings by which no weight would change, a sentence each; needs no model.

    Args:
        module: its settings.
        max_epochs: the trainer's; None, -1 or 0 (as the doctor has it) for no limit.
    """
    sampling = module.sampling
    found = []
    weighted = [term for term in module.rewards.terms.values() if not _weightless(term, max_epochs)]
    if not weighted:
        names = ", ".join(module.rewards.terms)
        found.append(
            f"rewards: all weights are 0 in all epochs ({names}), so that nothing trains: give one a weight, or use "
            "lightning-fdfo validate, which scores without training"
        )
    by_gradient = module.objective.normalization == "mean_square" and any(term.gradient for term in weighted)
    with suppress(ValueError):  # a negative one has its own error
        churns = churns_on(_grid(sampling), sampling.churn, initial_churn=sampling.initial_churn)
        if not by_gradient and not churns.any():
            found.append(
                f"sampling: with churn {sampling.churn} and initial_churn {sampling.initial_churn} at "
                f"{sampling.num_steps} steps the two images of every pair are equal, so that nothing trains: expected "
                "a churn above 0, such as the paper's 0.0025"
            )
    if _no_rate(module, max_epochs):
        found.append(
            "optimizer: the learning rate is 0 at every step, so that nothing trains: expected lr above 0, or an "
            "lr_scheduler that raises it"
        )
    return found


def _grid(sampling: Sampling) -> Tensor:
    """Noise levels that stand for the model's own, which is not loaded: a schedule is asked for many.

    The steps of a number all have the same churn, but for the last, and there may be a billion.
    """
    return uniform_sigmas(1000 if isinstance(sampling.churn, ChurnSchedule) else min(sampling.num_steps, 2))


def _weightless(term: RewardTerm, max_epochs: int | None) -> bool:
    """Whether a term has no weight in any epoch of the run; between the epochs that are named it is linear."""
    if not isinstance(term.weight, Mapping):
        return term.weight == 0
    last = max_epochs - 1 if max_epochs and max_epochs > 0 else max(term.weight)
    return not any(term.weight_at(epoch) for epoch in {0, last, *(key for key in term.weight if key < last)})


def _no_rate(module: TrainingModule, max_epochs: int | None) -> bool:
    """Whether the learning rate is 0 at every step; what an optimiser refuses is reported elsewhere."""
    try:
        optimizer = build_optimizer(module.optimizer, [torch.nn.Parameter(torch.zeros(1))])
        groups = optimizer_groups(optimizer)
        if module.lr_scheduler is None or any(group["lr"] for group in groups):
            return not any(group["lr"] for group in groups)
        epochs = max_epochs if max_epochs and max_epochs > 0 else MAX_STEPS
        twin, _ = replayed(module.lr_scheduler, optimizer, groups, 0)
        for _ in range(min(epochs * module.batching.updates_per_epoch, MAX_STEPS)):
            if any(twin.get_last_lr()):
                return False
            twin.optimizer._opt_called = True  # type: ignore[attr-defined]  # it has nothing to update
            twin.step()
    except ConfigurationError:
        return False
    return True
