"""EpochLog: means over an epoch and over devices, written to the loggers before the epoch's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


class EpochLog:
    """Adds numbers up where they are, and logs their means once, when the epoch ends.

        mean = sum(count * value) / sum(count)

    Lightning's `log_dict` is not called for each batch, where its bookkeeping costs time. The means are logged at the
    last batch, so that they are in `trainer.callback_metrics` when callbacks' hooks of the epoch's end ask for them.
    Lightning would write them after the epoch's checkpoint, so that a run killed between the two went on without them:
    `FDFOModule.on_train_epoch_end` calls `write`, and Lightning calls that hook before all checkpoint callbacks.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        """What this epoch has logged, from its last batch until it is written: `trainer.callback_metrics` keeps the
        last value of a number that only some epochs log."""
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def clear(self) -> None:
        """Forgets what an earlier `fit` has left of an epoch that it did not end."""
        self._sums.clear()
        self.names.clear()

    def add(self, module: LightningModule, values: Mapping[str, Any], count: int) -> None:
        """Adds numbers of this device to their means; in validation Lightning's `log_dict` does it.

        Args:
            module: attached to a trainer, within one of its hooks.
            values: name -> a number, or a tensor of one.
            count: how much they weigh in the mean, such as the number of points or images that they are means of.
        """
        trainer = module.trainer
        if trainer.barebones:  # it logs nothing, and would warn of each number
            return
        if not trainer.training:
            # Lightning divides the number of images by that of devices, in integers: made divisible, it loses nothing.
            devices = trainer.world_size
            module.log_dict(
                dict(values), on_step=False, on_epoch=True, batch_size=count * devices, sync_dist=devices > 1
            )
            return
        for name, value in values.items():
            number = torch.as_tensor(value, dtype=torch.float32).detach() * count
            total, weight = self._sums.get(name, (torch.zeros_like(number), 0))
            self._sums[name] = (total + number, weight + count)

    def end_batch(self, module: LightningModule) -> None:
        """Logs the means after an epoch's last batch, over all devices."""
        trainer = module.trainer
        if trainer.is_last_batch and self._sums:
            means = {name: (total / count).to(module.device) for name, (total, count) in self._sums.items()}
            sync = trainer.world_size > 1
            module.log_dict(means, logger=False, on_step=False, on_epoch=True, batch_size=1, sync_dist=sync)
            self.names.update(means)
            self._sums.clear()

    def write(self, trainer: Trainer) -> None:
        """Writes the epoch's means to the loggers, and forgets their names: they come and go, as a share does."""
        metrics = trainer.callback_metrics
        row = {name: metrics[name].item() for name in sorted(self.names)} | {"epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step - 1)
            logger.save()
        self.clear()
