"""RolloutLog: logs an epoch's rollout at its first batch, and the speed of training at its last."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_fdfo.parallel import all_sum
from lightning_fdfo.rollout.collector import RolloutCollector
from lightning_fdfo.rollout.points import TrajectoryPoints
from lightning_fdfo.training.protocol import TrainingModule
from lightning_fdfo.training.step import drift


class RolloutLog(Callback):
    """Logs the collector's numbers, `train/drift` of a LoRA, and `train/points_per_second`.

    The drift takes the base model's velocity at an epoch's first batch: a forward of its own, unless a `kl_weight`
    needs it too. An epoch's rollout lies behind its first batch. With a `kl_target` it is measured in each epoch, and
    moves the weight, `train/kl_weight`.

    `FDFOModule.configure_callbacks` returns this callback.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an epoch that an earlier `fit` did not end."""
        cast(TrainingModule, pl_module).epoch_log.clear()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TrajectoryPoints, batch_idx: int
    ) -> None:
        """Logs the rollout, at an epoch's first batch."""
        if batch_idx:
            return
        module = cast(TrainingModule, pl_module)
        metrics: dict[str, Any] = dict(cast(RolloutCollector, module.collector).metrics)
        steers = module.objective.kl_target is not None
        if module.lora is not None and (steers or trainer.current_epoch % module.evaluation.drift_every == 0):
            with trainer.precision_plugin.forward_context():
                base_velocity = module.base_velocity(batch)
            measured = drift(batch.old_velocity, base_velocity, partial(all_sum, trainer))
            metrics["train/drift"] = measured
            if steers:
                module.adaptation.steer_kl(trainer.current_epoch, measured.item())
                metrics["train/kl_weight"] = module.adaptation.kl_weight
        module.log_means(metrics, 1)
        if not trainer.barebones:
            pl_module.log("mean_reward", metrics["reward/mean"], prog_bar=True, logger=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TrajectoryPoints, batch_idx: int
    ) -> None:
        """Logs the speed of training, after an epoch's last batch."""
        if trainer.is_last_batch:
            module = cast(TrainingModule, pl_module)
            collector = cast(RolloutCollector, module.collector)
            points = collector.plan.num_pairs * collector.plan.points_per_pair
            module.log_means({"train/points_per_second": points / (time.perf_counter() - collector.end)}, 1)
