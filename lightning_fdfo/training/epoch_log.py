"""EpochLog: means over an epoch and over devices, written to the loggers before the epoch's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer


class EpochLog:
    """Collects numbers by Lightning's own `log_dict`, and writes those of training when the epoch ends.

    Lightning would write them after the epoch's checkpoint, so that a run killed between the two went on without them.
    `FDFOModule.on_train_epoch_end` calls `write`: Lightning calls that hook before all checkpoint callbacks.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def add(self, module: LightningModule, values: Mapping[str, Any], count: int) -> None:
        """Adds numbers of this device to their means.

        Args:
            module: attached to a trainer, within one of its hooks.
            values: name -> a number, or a tensor of one.
            count: how much they weigh in the mean, such as the number of points or images that they are means of.
        """
        trainer = module.trainer
        if trainer.barebones:  # it logs nothing, and would warn of each number
            return
        if trainer.training:
            self._names.update(values)
        devices = trainer.world_size
        # Lightning divides the number of images by that of devices, in integers: made divisible, it loses nothing.
        module.log_dict(
            dict(values),
            logger=False if trainer.training else None,
            on_step=False,
            on_epoch=True,
            batch_size=count * devices,
            sync_dist=devices > 1,
        )

    def write(self, trainer: Trainer) -> None:
        """Writes the epoch's numbers to the loggers, and forgets their names: they come and go, as a share does."""
        metrics = trainer.callback_metrics
        row = {name: metrics[name].item() for name in sorted(self._names)} | {"epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step - 1)
            logger.save()
        self._names.clear()
