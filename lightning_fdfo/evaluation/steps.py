"""EvaluationSteps: the hooks of `validate`, `test` and `predict`, which hand their work to the Evaluator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_fdfo.evaluation.comparison import MetricRow
from lightning_fdfo.evaluation.evaluator import Evaluator
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.prompts import IndexedPrompt
from lightning_fdfo.training.base_weights import BaseWeights


class EvaluationSteps(LightningModule):
    """A LightningModule that can validate, test and predict; `FDFOModule` adds what trains."""

    flow: FlowModel
    evaluator: Evaluator
    base: BaseWeights | None

    @abstractmethod
    def to_device(self) -> None:
        """Puts text encoders, VAE and rewards on the device; a second call does nothing."""

    @abstractmethod
    def log_means(self, values: Mapping[str, Any], count: int) -> None:
        """Logs means over an epoch and over devices."""

    def on_validation_start(self) -> None:
        self.to_device()

    def validation_step(self, batch: list[IndexedPrompt], batch_idx: int) -> dict[str, Any]:
        """Generates images from fixed latents without churn and scores them: `Evaluator.validate`, for callbacks."""
        outputs = self.evaluator.validate(batch, self.device, self.current_epoch, batch_idx)
        for name, score in outputs["scores"].items():
            scored = score.values[score.scored]
            self.log_means({f"val/{name}": scored.mean() if len(scored) else torch.zeros(())}, len(scored))
        return outputs

    def on_test_start(self) -> None:
        """Begins to compare; raises ConfigurationError if the base model's weights are wanted and gone."""
        self.to_device()
        self.evaluator.start_comparison(self.device, self.base)

    def test_step(self, batch: list[IndexedPrompt], batch_idx: int) -> None:
        """Generates images with the tuned model and with the base, from the same latents; compares their scores."""
        self.evaluator.compare(batch, self.device, self.current_epoch)

    def on_test_epoch_end(self) -> None:
        """Computes all numbers over all devices, for `comparison`, and logs the means as `test/NAME`."""
        means = {f"test/{row.name}": row.tuned.mean for row in self.evaluator.finish_comparison()}
        self.log_dict(means, sync_dist=self.trainer.world_size > 1)

    @property
    def comparison(self) -> list[MetricRow]:
        """What the last `test` has computed."""
        return self.evaluator.rows

    def on_predict_start(self) -> None:
        self.flow.to_device(self.device)

    def predict_step(self, batch: list[IndexedPrompt], batch_idx: int) -> dict[str, Any]:
        """Generates images: `images` [N, 3, H, W] on the CPU, and their `rows`, of those that count."""
        rows = [row for row in batch if row.counted]
        return {"images": self.evaluator.generate(batch, self.device)[: len(rows)].cpu(), "rows": rows}
