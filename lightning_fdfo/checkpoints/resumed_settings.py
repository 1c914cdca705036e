"""ResumedSettings: each checkpoint records the settings of its run; a resume reports what has changed, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_fdfo.checkpoints.replayed_scheduler import apply_settings, replayed
from lightning_fdfo.checkpoints.settings_record import difference_lines, settings_record
from lightning_fdfo.training.optimizer_settings import (
    ResumedOptimizer,
    check_same,
    optimizer_groups,
    optimizer_record,
    resumed_optimizer,
    scheduler_record,
)
from lightning_fdfo.training.optimizers import build_optimizer
from lightning_fdfo.training.protocol import TrainingModule

ENTRY = "settings"
"""Of a checkpoint's `fdfo`."""


class ResumedSettings(Callback):
    """Records a run's settings in its checkpoints, and says on a resume which of them are not the checkpoint's.

    A line a setting, on the first process. Rewards, sampling, objective and prompts are the configuration's. The
    optimiser's settings are the checkpoint's, as its moments are, but for those in the module's `resume_overrides`,
    which the command line fills with what it names. `FDFOModule.configure_callbacks` returns it.
    """

    def __init__(self) -> None:
        self._optimizer: dict[str, Any] = {}
        self._resumed: ResumedOptimizer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what a fit that failed before its first batch has left."""
        self._resumed = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compares, where a fit resumes; Lightning restores schedulers after this, with every strategy.

        Raises:
            ConfigurationError: the checkpoint is of another optimiser.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        module = cast(TrainingModule, pl_module)
        saved = checkpoint["fdfo"].get(ENTRY)
        optimizer, scheduler = configured(module)
        self._resumed = resumed_optimizer(
            saved, optimizer, scheduler_record(scheduler), checkpoint, module.resume_overrides
        )
        if self._resumed.replaces:
            checkpoint["lr_schedulers"] = []  # a state of another class: `on_train_start` computes its own
        for line in [*self._resumed.lines, *difference_lines(saved, settings_record(module))]:
            rank_zero_info(f"resume: {line}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the settings count that do, after Lightning has restored the optimiser."""
        module = cast(TrainingModule, pl_module)
        optimizer, scheduler = configured(module)
        groups = optimizer_groups(optimizer)
        if self._resumed is not None:
            groups = self._resumed.groups
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            restored = schedulers[0] if schedulers else None
            apply_settings(trainer.optimizers[0], restored, self._resumed, module.lr_scheduler, trainer.global_step)
        self._optimizer = {
            "optimizer": optimizer_record(optimizer, groups),
            "lr_scheduler": scheduler_record(scheduler),
        }
        self._resumed = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the record to the checkpoint's `fdfo`."""
        record = settings_record(cast(TrainingModule, pl_module)) | self._optimizer
        checkpoint.setdefault("fdfo", {})[ENTRY] = record


def check_optimizer(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Raises ConfigurationError if a checkpoint is of another optimiser than the configuration's; needs no model."""
    identity = checkpoint.get("fdfo")
    saved = identity.get(ENTRY) if isinstance(identity, dict) else None
    placeholder = torch.nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer(cast(TrainingModule, module).optimizer, [placeholder])
    check_same(saved if isinstance(saved, dict) else {}, checkpoint, optimizer)


def configured(module: TrainingModule) -> tuple[Optimizer, LRScheduler | None]:
    """Another optimiser and scheduler as the configuration has them; those that train are left alone."""
    optimizer = module.optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])
    if module.lr_scheduler is None:
        return optimizer, None
    return optimizer, replayed(module.lr_scheduler, optimizer, optimizer_groups(optimizer), num_steps=0)[0]
