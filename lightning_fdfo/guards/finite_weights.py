"""FiniteWeights: ends a run whose weights are not finite, before they are saved."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_fdfo.errors import DivergenceError
from lightning_fdfo.finite import finite_tensors
from lightning_fdfo.parallel import all_sum, reshard
from lightning_fdfo.rollout.points import TrajectoryPoints
from lightning_fdfo.training.protocol import TrainingModule
from lightning_fdfo.training.trained_state import trainable
from lightning_fdfo.training.update_guard import recovery


class _WithVelocity(TrainingModule, Protocol):
    def velocity(self, batch: TrajectoryPoints) -> Tensor:
        """At a batch's points."""


class FiniteWeights(Callback):
    """Ends a run whose weights, or the velocities that they give, are not finite.

    Weights are read after each optimiser step, all of them. At an epoch's end, before its checkpoint is written, the
    velocity is taken at one of its points: weights can be finite and still of no use. The module has this guard by
    itself (`FDFOModule.configure_callbacks`): a configuration need not name it.

    Raises:
        DivergenceError: at the step, or at the epoch's end.
    """

    def __init__(self) -> None:
        self._step = 0
        self._point: TrajectoryPoints | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the point of a fit before."""
        self._point = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes where the run begins, or resumes."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TrajectoryPoints, batch_idx: int
    ) -> None:
        """Reads the weights if this batch has ended in an optimiser step; keeps a point for the epoch's end."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._point = batch.first()
        weights = trainable(pl_module)
        broken = all_sum(trainer, (~finite_tensors(list(weights.values()))).float())
        if broken.any():
            first = list(weights)[int(broken.argmax())]
            raise DivergenceError(
                f"epoch {trainer.current_epoch}, update {trainer.global_step - 1}: {int((broken > 0).sum())} of "
                f"{len(weights)} weights are not finite after it, first {first}; {recovery(trainer)}"
            )

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the velocity at one point; here dropout is off again, and checkpoints are still to come."""
        if self._point is None:
            return
        module = cast(_WithVelocity, pl_module)
        with trainer.precision_plugin.forward_context():
            velocity = module.velocity(self._point)
        reshard(module.flow.transformer)  # the checkpoint that comes next takes each device's own part
        if all_sum(trainer, (~velocity.isfinite()).any().float().reshape(1)).any():
            raise DivergenceError(
                f"epoch {trainer.current_epoch}: with the weights after its last update, velocities are not finite; "
                f"{recovery(trainer)}"
            )
