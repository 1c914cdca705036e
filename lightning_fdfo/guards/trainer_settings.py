"""Which settings and callbacks of the Trainer are allowed, and which are refused because they would change an update.

An epoch is `updates_per_epoch` optimiser steps over all its points. What would cut an epoch short, step elsewhere, or
write the weights is refused in one sentence; everything else of Lightning's works as Lightning documents it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.callbacks.timer import Interval
from lightning.pytorch.trainer.states import TrainerFn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.rollout.plan import BatchPlan

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Of the trainer's: those in which stored latents, sigma and the objective stay float32."""
_AVERAGES = "it copies the frozen weights too, and its checkpoints hold the average in place of the weights"
REFUSED: Mapping[type[Callback], str] = {
    GradientAccumulationScheduler: "the accumulation follows from model.batching, "
    "and with another one an update has a gradient of another size; leave it out",
    StochasticWeightAveraging: f"{_AVERAGES}; use lightning_fdfo.callbacks.EMA",
    WeightAveraging: f"{_AVERAGES}; use lightning_fdfo.callbacks.EMA",
    BatchSizeFinder: "it trains on a rollout with batch sizes that it tries; set model.batching.batch_size, for "
    "which lightning-fdfo doctor estimates the memory",
    LearningRateFinder: "it trains on a rollout with rates that rise by the batch; set the optimizer's lr",
    ModelPruning: "it takes weights out of the base model; leave it out",
    BaseFinetuning: "it thaws frozen weights; model.lora says what trains",
}
"""Callbacks of Lightning's that would change an update or its weights, and what to do instead."""


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuses callbacks that would change what an update is.

    Raises:
        ConfigurationError: there is one; the message says what to use instead.

    Example:
        >>> check_callbacks([GradientAccumulationScheduler({0: 2})])
        Traceback (most recent call last):
        lightning_fdfo.errors.ConfigurationError: trainer.callbacks: GradientAccumulationScheduler cannot be used: ...
    """
    for callback in callbacks:
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise ConfigurationError(f"trainer.callbacks: {type(callback).__name__} cannot be used: {reason}")


def check_epoch(trainer: Trainer, plan: BatchPlan) -> None:
    """Refuses settings of `fit` under which an epoch would not be its updates.

    Args:
        trainer: before its loops run.
        plan: the arithmetic of an epoch.

    Raises:
        ConfigurationError: the message names the setting, and what to set instead.
    """
    check_clipping(trainer.gradient_clip_val)
    overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit:
        raise ConfigurationError(
            f"trainer.overfit_batches={overfit}: an epoch's batches are rolled out again, so that none "
            "can be kept; to overfit, give data.train a file of few prompts"
        )
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # it sets what follows, and says that it only tries
        return
    limit, batches = trainer.limit_train_batches, plan.batches_per_epoch
    if limit < 1.0 if isinstance(limit, float) else limit < batches:
        raise ConfigurationError(
            f"trainer.limit_train_batches={limit}: an epoch is {plan.updates_per_epoch} updates of "
            f"{plan.batches_per_update} batches, and part of an update has part of its gradient; "
            "for a shorter epoch lower model.batching.num_pairs or num_points_per_pair"
        )
    if trainer.max_steps != -1:
        epochs = math.ceil(trainer.max_steps / plan.updates_per_epoch)
        raise ConfigurationError(
            f"trainer.max_steps={trainer.max_steps}: a run that stops within an epoch cannot resume exactly; "
            f"an epoch is {plan.updates_per_epoch} updates: set trainer.max_epochs={epochs}"
        )
    interval = getattr(trainer, "val_check_interval", None)  # none where it is a time
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and interval > batches:
        raise ConfigurationError(
            f"trainer.val_check_interval={interval}: an epoch has {batches} batches; to validate once in several "
            "epochs set trainer.check_val_every_n_epoch"
        )


def check_clipping(value: float | None) -> None:
    """Raises ConfigurationError for a limit of the gradient that is below 0 or NaN: Lightning would not clip.

    Example:
        >>> check_clipping(1.0), check_clipping(None)
        (None, None)
    """
    if value is not None and not value >= 0:
        raise ConfigurationError(f"trainer.gradient_clip_val: expected above 0, or null for none, got {value}")


def check_precision(trainer: Trainer) -> None:
    """Raises ConfigurationError for a precision in which latents, sigma or the objective would not stay float32."""
    if trainer.precision not in PRECISIONS:
        raise ConfigurationError(
            f"trainer.precision={trainer.precision}: expected one of {', '.join(PRECISIONS)}; "
            "the frozen weights have a dtype of their own, model.flow.init_args.dtype"
        )


def derive_accumulation(trainer: Trainer, plan: BatchPlan) -> None:
    """Lets an update be as many batches as the plan says; raises ConfigurationError if another number was set."""
    given, derived = trainer.accumulate_grad_batches, plan.batches_per_update
    if given not in (1, derived):
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches={given}: leave it out, it is derived (here {derived})"
        )
    trainer.accumulate_grad_batches = derived


def check_accumulation(trainer: Trainer, plan: BatchPlan) -> None:
    """Raises ConfigurationError if something has changed the accumulation that was derived at set-up."""
    if trainer.accumulate_grad_batches != plan.batches_per_update:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches has become {trainer.accumulate_grad_batches} since set-up, and "
            f"an update is {plan.batches_per_update} batches: leave out the callback that has changed it"
        )


def stop_between_epochs(trainer: Trainer) -> None:
    """Lets `trainer.max_time`, and any Timer, end the run after the epoch in which the time is up.

    Within an epoch, where a Timer stops by default, the weights and the rollout that they learn from have parted, and a
    run cannot resume exactly.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer):
            callback._interval = Interval.epoch  # max_time offers no other way


def check_trainer_settings(trainer: Trainer, plan: BatchPlan | None) -> None:
    """All of this, before a callback's first hook and before any model is loaded.

    Args:
        trainer: about to run.
        plan: the arithmetic of an epoch; None where nothing is trained.

    Raises:
        ConfigurationError: see `check_callbacks` and `check_epoch`.
    """
    check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
    if trainer.state.fn == TrainerFn.FITTING and plan is not None:
        check_epoch(trainer, plan)
        stop_between_epochs(trainer)
