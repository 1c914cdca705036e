"""What a rollout asks of the run that it belongs to: its devices, precision, epoch, progress bar and callbacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_fdfo.parallel import all_sum
from lightning_fdfo.rollout.progress_bar import rollout_bar


class RunContext:
    """The trainer, as a rollout sees it.

    Args:
        trainer: that runs `fit`. A copy or a pickle of this object has none, like that of a LightningModule.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Trainer | None = trainer

    def __getstate__(self) -> dict[str, Any]:
        return {"_trainer": None}

    @property
    def trainer(self) -> Trainer:
        """The trainer; raises RuntimeError in a copy."""
        if self._trainer is None:
            raise RuntimeError("a copy of a RunContext has no trainer: make a new one from the trainer that runs")
        return self._trainer

    @property
    def rank(self) -> int:
        """This device's number, from 0."""
        return self.trainer.global_rank

    @property
    def device(self) -> torch.device:
        """Where the model of this process is."""
        return self.trainer.strategy.root_device

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.trainer.default_root_dir)

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self.trainer.current_epoch

    def precision(self) -> AbstractContextManager[None]:
        """The trainer's own precision, so that rollout and training see the same numerics."""
        return self.trainer.precision_plugin.forward_context()

    def all_sum(self, values: Tensor) -> Tensor:
        """The sum over devices, on the CPU."""
        return all_sum(self.trainer, values)

    def track(self, batches: Sequence[range]) -> Iterator[range]:
        """Yields the batches of a rollout, with a progress bar where the trainer has one."""
        return rollout_bar(self.trainer, batches)

    def announce(self, event: str, *arguments: Any) -> None:
        """Calls `event(trainer, pl_module, *arguments)` of each callback that has such a method."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            method = getattr(callback, event, None)
            if method is not None:
                method(self.trainer, self.trainer.lightning_module, *arguments)
