"""All guards of a run: refuses settings that cannot work, and adds the callbacks that every run has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from lightning_fdfo.checkpoints.resumed_settings import ResumedSettings
from lightning_fdfo.checkpoints.run_owner import RunOwner
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.guards.capacity import check_fits
from lightning_fdfo.guards.finite_weights import FiniteWeights
from lightning_fdfo.guards.fit_callbacks import fit_callbacks, not_present
from lightning_fdfo.guards.learning_guard import LearningGuard
from lightning_fdfo.guards.module_use import check_use, use_safe_checkpoints
from lightning_fdfo.guards.trainer_settings import check_trainer_settings
from lightning_fdfo.rollout.plan import BatchPlan
from lightning_fdfo.training.optimizers import try_optimizer
from lightning_fdfo.training.protocol import TrainingModule
from lightning_fdfo.training.rollout_log import RolloutLog
from lightning_fdfo.training.update_guard import UpdateGuard

KINDS: tuple[Callable[[], Callback], ...] = (
    RunOwner,
    FiniteWeights,
    UpdateGuard,
    RolloutLog,
    ResumedSettings,
    LearningGuard,
)
"""Of every command; `fit_callbacks` come after them."""


class PlannedModule(TrainingModule, Protocol):
    """A module that knows the arithmetic of its epochs."""

    @property
    def plan(self) -> BatchPlan:
        """Raises ConfigurationError if it does not work out."""


def all_guards(module: LightningModule, settings: PlannedModule) -> list[Callback]:
    """Refuses callbacks and settings that would change an update, before any hook of theirs, and returns the guards.

    Args:
        module: attached to a trainer.
        settings: the same module, by what guards know of it.

    Returns:
        For `LightningModule.configure_callbacks`: those that the trainer does not have yet.

    Raises:
        ConfigurationError: see the modules of this folder; or an optimiser or scheduler that cannot work.
    """
    trainer = module.trainer
    check_use(module)
    use_safe_checkpoints(trainer)
    try:
        plan = settings.plan if trainer.state.fn == TrainerFn.FITTING else None
    except ConfigurationError:
        check_fits(settings, "fit")  # that a number is far too large comes before what it would have to divide by
        raise
    check_trainer_settings(trainer, plan)
    if plan is not None:
        num_updates = max(trainer.max_epochs or 0, 0) * plan.updates_per_epoch
        try_optimizer(settings.optimizer, settings.lr_scheduler, num_updates, trainer.strategy.root_device)
    return not_present(trainer, [*(kind() for kind in KINDS), *fit_callbacks(trainer)])
