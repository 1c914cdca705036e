"""The callbacks that no `fit` is without, whether the command starts it or plain Python."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_fdfo.checkpoints.last_checkpoint import LastCheckpoint
from lightning_fdfo.guards.stop import StopOnSignal


def missing_guards(trainer: Trainer) -> list[Callback]:
    """Those that a trainer does not have yet, for `LightningModule.configure_callbacks`.

    Without `enable_checkpointing` nothing is saved, and the start says so.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return []
    guards: list[Callback] = [StopOnSignal()]
    if trainer.checkpoint_callbacks:
        guards.append(LastCheckpoint())
    elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
        rank_zero_info("Checkpoints are switched off: a run that is stopped or killed is lost.")
    present = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    return [guard for guard in guards if type(guard) not in present]
