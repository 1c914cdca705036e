"""RewardCurve: the mean reward over epochs, as a picture."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from lightning_fdfo.callbacks.run_folder import judges_a_fit, run_folder


class RewardCurve(Callback):
    """Draws the mean reward of each epoch's rollouts, and of each validation, to `reward_curve.png` at the end."""

    def __init__(self) -> None:
        self.rollouts: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """The curve so far."""
        return {"rollouts": self.rollouts, "validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the curve up where it stopped."""
        self.rollouts, self.validations = state_dict["rollouts"], state_dict["validations"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes a validation's mean reward."""
        if not judges_a_fit(trainer) or "val/reward" not in trainer.callback_metrics:
            return
        epoch = 0 if trainer.sanity_checking else trainer.current_epoch + 1
        self.validations.append((epoch, trainer.callback_metrics["val/reward"].item()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes an epoch's mean reward."""
        self.rollouts.append((trainer.current_epoch + 1, trainer.callback_metrics["reward/mean"].item()))

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws."""
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        for points, style, label in (
            (self.rollouts, "-", "rollouts"),
            (self.validations, "o-", "validation, no churn"),
        ):
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(xlabel="epoch", ylabel="mean reward")
        axes.grid(alpha=0.3)
        if self.rollouts or self.validations:
            axes.legend()
        figure.savefig(run_folder(trainer) / "reward_curve.png", dpi=120)
