"""UpdateGuard: an update whose gradient is not finite is skipped, and too many in a row end the run."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_fdfo.errors import DivergenceError
from lightning_fdfo.parallel import full_tensors
from lightning_fdfo.training.protocol import TrainingModule


class UpdateGuard(Callback):
    """Looks at each update's gradient before it is clipped, and logs its norm and the learning rate.

    A gradient that is not finite is taken away: optimisers pass over weights without one. `FailurePolicy.max_skipped`
    says how many updates in a row may be skipped. With precision 16-mixed the scaler skips by itself, as it must to
    find its scale, and only the count is kept. `FDFOModule.configure_callbacks` returns this guard.

    Raises:
        DivergenceError: at an update, if too many before it were skipped; at the end of a run, if all were.
    """

    def __init__(self) -> None:
        self.num_updates = 0
        """Updates of this `fit`, with those that were skipped."""
        self.num_skipped = 0
        self._skipped_in_a_row = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier fit's updates."""
        self.num_updates = self.num_skipped = self._skipped_in_a_row = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports a `fit` without `ckpt_path` from trained weights, as in a notebook's cell that is run again."""
        if cast(TrainingModule, pl_module).has_trained and trainer.ckpt_path is None:
            rank_zero_info(
                "This fit begins from weights that an earlier fit or checkpoint has left in the module, with a new "
                "optimizer; to resume exactly give ckpt_path, to start from scratch build a new FDFOModule"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs, and skips the update if its gradient is not finite."""
        module = cast(TrainingModule, pl_module)
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        norm = full_tensors({"norm": torch.nn.utils.get_total_norm(gradients)})["norm"]
        finite = bool(norm.isfinite())
        self.num_updates += 1
        self.num_skipped += not finite
        if finite or trainer.precision == "16-mixed":
            self._skipped_in_a_row = 0
        else:
            self._skip(trainer, pl_module, norm)
        logged = {"train/learning_rate": optimizer.param_groups[0]["lr"], "train/skipped": float(not finite)}
        module.log_means(logged | ({"train/grad_norm": norm} if finite else {}), 1)

    def _skip(self, trainer: Trainer, pl_module: LightningModule, norm: Tensor) -> None:
        for parameter in pl_module.parameters():
            parameter.grad = None
        self._skipped_in_a_row += 1
        limit = cast(TrainingModule, pl_module).failures.max_skipped
        problem = f"update {trainer.global_step}: the gradient's norm is {norm.item()}"
        if self._skipped_in_a_row > limit:
            raise DivergenceError(f"{problem}, as for {limit} updates before it; {recovery(trainer)}")
        warnings.warn(f"{problem}: it is skipped", stacklevel=2)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that has skipped all its updates has trained nothing."""
        if self.num_updates and self.num_skipped == self.num_updates:
            raise DivergenceError(
                f"all {self.num_updates} updates of this run were skipped, for their gradients were not finite: "
                "nothing has been trained; look at the rewards, and try a smaller learning rate or guidance_scale"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._note(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._note(pl_module)  # Lightning tears nothing down then

    def _note(self, pl_module: LightningModule) -> None:
        """Notes in the module whether this fit has left its weights there."""
        module = cast(TrainingModule, pl_module)
        module.has_trained = module.has_trained or self.num_updates > 0


def recovery(trainer: Trainer) -> str:
    """What to do after weights have diverged, with the last checkpoint if there is one."""
    callbacks = trainer.checkpoint_callbacks
    paths = [getattr(one, name, "") for name in ("last_model_path", "best_model_path") for one in callbacks]
    last = next(filter(None, paths), "")
    return (
        f"resume from {last or 'an earlier checkpoint'} with a smaller learning rate, or look at the rewards of the "
        "last epochs"
    )
