"""TrainingModule: the attributes of the module that guards and checkpoints use, as a protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.rollout.adaptation import Adaptation
from lightning_fdfo.rollout.algorithm import Algorithm
from lightning_fdfo.rollout.collector import RolloutCollector
from lightning_fdfo.rollout.points import TrajectoryPoints
from lightning_fdfo.settings import Batching, Evaluation, FailurePolicy, Objective, Sampling
from lightning_fdfo.training.epoch_log import EpochLog
from lightning_fdfo.training.seeded_dropout import SeededDropout


class TrainingModule(Protocol):
    """`FDFOModule`, as the rooms below it see it; see there for what each of these is."""

    flow: FlowModel
    rewards: RewardMix
    sampling: Sampling
    batching: Batching
    objective: Objective
    evaluation: Evaluation
    lora: LoRA | None
    lora_file: Path | None
    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None
    failures: FailurePolicy
    resume_overrides: frozenset[str]
    has_trained: bool
    collector: RolloutCollector | None
    algorithm: Algorithm | None
    adaptation: Adaptation
    batch: TrajectoryPoints | None
    epoch_log: EpochLog
    dropout: SeededDropout

    @property
    def trainer(self) -> Trainer:
        """The trainer that it is attached to."""

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All, with those that are frozen."""

    def log_means(self, values: Mapping[str, Any], count: int) -> None:
        """Logs means over an epoch and over devices, see `EpochLog.add`."""

    def velocity(self, batch: TrajectoryPoints) -> Tensor:
        """The flow's velocity at a batch's points: [B, ...]."""

    def base_velocity(self, batch: TrajectoryPoints) -> Tensor:
        """The base model's velocity at a batch's points: [B, ...]."""
