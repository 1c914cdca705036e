"""LearningGuard: refuses a run that cannot learn, and reports once each reward that teaches nothing."""

from __future__ import annotations

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.guards.silent_rewards import nothing_learned
from lightning_fdfo.guards.untrainable_settings import cannot_learn
from lightning_fdfo.rollout.pairs import Rollout
from lightning_fdfo.rollout.scores import EpochScores
from lightning_fdfo.training.protocol import TrainingModule


class LearningGuard(Callback):
    """Looks at the settings before a model is loaded, and at each epoch's pairs, of all devices, when they are scored.

    `FDFOModule.configure_callbacks` returns it.
    """

    def __init__(self) -> None:
        self._reported: set[str] = set()
        self._rolled_out = self._trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ConfigurationError for settings by which no weight would change."""
        if stage != "fit":
            return
        self._reported, self._rolled_out, self._trained = set(), False, False
        if found := cannot_learn(cast(TrainingModule, pl_module), trainer.max_epochs):
            raise ConfigurationError("; ".join(found))

    def on_rollout_end(
        self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout, scores: EpochScores
    ) -> None:
        """Reports what teaches nothing in the epoch, by name; numbers are those of all devices."""
        self._rolled_out = True
        self._trained = self._trained or bool(scores.difference.any()) or bool(rollout.gradients)
        for key, sentence in nothing_learned(scores, cast(TrainingModule, pl_module).rewards, trainer.current_epoch):
            if key not in self._reported:
                self._reported.add(key)
                rank_zero_warn(sentence)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so if no pair of this process's epochs has trained anything; those before a resume may have."""
        if self._rolled_out and not self._trained:
            rank_zero_warn("no pair of any epoch of this process had a difference: they taught nothing")
