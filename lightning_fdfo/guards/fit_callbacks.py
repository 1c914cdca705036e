"""Callbacks added to every `fit`, by the command and in plain Python."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_fdfo.checkpoints.last_checkpoint import LastCheckpoint
from lightning_fdfo.guards.stop import StopOnSignal


def fit_callbacks(trainer: Trainer) -> list[Callback]:
    """Those of a `fit`; none for other commands.

    Without `enable_checkpointing` nothing is saved, and the start says so.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return []
    callbacks: list[Callback] = [StopOnSignal()]
    if trainer.checkpoint_callbacks:
        callbacks.append(LastCheckpoint())
    elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
        rank_zero_info("Checkpoints are switched off: a run that is stopped or killed is lost.")
    return callbacks


def not_present(trainer: Trainer, callbacks: Iterable[Callback]) -> list[Callback]:
    """Those of which a trainer has none of the same class yet, for `LightningModule.configure_callbacks`."""
    present = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    return [callback for callback in callbacks if type(callback) not in present]
