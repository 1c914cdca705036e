"""FDFOModule: Lightning's hooks, which call the objects that do the work.

The rollout: `rollout/collector.py`; hooks of validation and test: `evaluation/steps.py`; guards: `guards/`. All else is
Lightning's. A checkpoint holds no hyper-parameters, which would silently override a configuration: see config.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.evaluation.evaluator import Evaluator
from lightning_fdfo.evaluation.steps import EvaluationSteps
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.guards.all_guards import all_guards
from lightning_fdfo.guards.capacity import check_fits
from lightning_fdfo.guards.module_use import Unsupported, check_arguments, check_flow_is_new, check_same_file
from lightning_fdfo.guards.trainer_settings import check_accumulation, check_precision, derive_accumulation
from lightning_fdfo.parallel import check_strategy, parallelize
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.prompt_check import check_prompts
from lightning_fdfo.rollout.adaptation import Adaptation
from lightning_fdfo.rollout.algorithm import Algorithm
from lightning_fdfo.rollout.collector import RolloutCollector
from lightning_fdfo.rollout.plan import BatchPlan
from lightning_fdfo.rollout.points import TrajectoryPoints
from lightning_fdfo.rollout.run_context import RunContext
from lightning_fdfo.settings import Batching, Evaluation, FailurePolicy, Objective, Sampling
from lightning_fdfo.training.base_weights import BaseWeights, has_lora
from lightning_fdfo.training.bind import bind, cache_texts, check_binding, check_trainable, load
from lightning_fdfo.training.epoch_log import EpochLog
from lightning_fdfo.training.optimizers import build_optimizers, paper_adamw
from lightning_fdfo.training.seeded_dropout import SeededDropout
from lightning_fdfo.training.step import batch_loss, fdfo_loss
from lightning_fdfo.training.summary import report_run
from lightning_fdfo.training.trained_state import TrainedState, trainable
from lightning_fdfo.training.trust_region import within_trust_region


class FDFOModule(Unsupported, EvaluationSteps, TrainedState):
    """Finite Difference Flow Optimization of a flow model.

    Args:
        flow: the base model.
        rewards: a mixture, see `RewardMix`.
        sampling: how images are generated.
        batching: the size of an epoch and of its forward passes.
        objective: settings of the loss.
        lora: settings of the LoRA; None trains the whole transformer.
        optimizer: from parameters to an optimiser.
        lr_scheduler: from an optimiser to a scheduler, stepped after each optimiser step.
        failures: which failures the run survives.
        evaluation: what validation and `test` compute beside the rewards.
        seed: >= 0; prompts, latents, noise and the LoRA's start are a function of it. The command line takes it
            from `seed_everything`.
        algorithm: another way to learn from the rollouts than FDFO's, see `Algorithm`.

    Raises:
        ConfigurationError: settings that cannot work; at set-up, before any model is loaded, where that can be known.

    Example:
        >>> from lightning_fdfo.flows import StableDiffusion3
        >>> module = FDFOModule(StableDiffusion3("tiny-digits", max_sequence_length=0), {"JPEGSize": 1.0})
        >>> module.batching.num_pairs, hasattr(module.flow, "transformer")  # nothing is loaded yet
        (432, False)

    Source: arXiv 2603.12893.
    """

    def __init__(
        self,
        flow: FlowModel,
        rewards: dict[str, Any],
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        batching: Batching = Batching(),  # noqa: B008 - frozen
        objective: Objective = Objective(),  # noqa: B008 - frozen
        lora: LoRA | None = LoRA(),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = paper_adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        failures: FailurePolicy = FailurePolicy(),  # noqa: B008 - frozen
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - frozen
        seed: int = 0,
        algorithm: Algorithm | None = None,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.rewards = RewardMix(rewards)
        check_arguments(objective, lora, seed, algorithm, self.rewards.terms)
        self.sampling = sampling
        self.batching = batching
        self.objective = objective
        self.lora = lora
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.failures = failures
        self.evaluation = evaluation
        self.seed = seed
        self.algorithm = algorithm
        self._point_loss = partial(fdfo_loss, clip_range=objective.clip_range) if algorithm is None else algorithm.loss
        self.adaptation = Adaptation(sampling, objective)
        self.resume_overrides: frozenset[str] = frozenset()
        """On a resume these count, not the checkpoint's: settings of the optimiser (`lr`; `*`: all), `lr_scheduler`."""
        self.lora_file: Path | None = None
        """To validate, test or predict with instead of the configuration's LoRA."""
        self.has_trained = False
        """Whether an earlier `fit`, or a checkpoint, has left its weights here."""
        self.strict_loading = False  # a checkpoint holds what trains; `check_restored` is strict about that
        self.evaluator = Evaluator(self)
        self.collector: RolloutCollector | None = None
        """The training loader, with scores and numbers of the last rollout; None before `fit`."""
        self.epoch_log = EpochLog()
        self.dropout = SeededDropout([], seed)
        self.batch: TrajectoryPoints | None = None
        """The one that was trained on last."""
        self.base: BaseWeights | None = None
        """The base model, where it is at hand: with a LoRA, and where evaluation compares with it."""
        self._prompts: list[Prompt] = []
        self._is_loaded = False
        self._loaded_file: Path | None = None  # the LoRA file that it was loaded with
        self._at: torch.device | None = None

    # Set-up: first all that needs no weights, then the model

    def configure_callbacks(self) -> list[Callback]:
        """Guards that every trainer of this module has, whatever its configuration names: see `all_guards`."""
        return all_guards(self, self)

    def prepare_data(self) -> None:
        """Fetches the rewards' weights, on one process of each machine; a failure is reported in `setup`, by all."""
        with suppress(ConfigurationError):
            self.flow.validate()
            self.flow.outline()  # a model that cannot be had: no need to fetch gigabytes for its rewards
            self.fetch_weights()

    def fetch_weights(self) -> None:
        """Finds the weights of rewards, metrics and, for `test`, the embedder; fetches what is missing."""
        if self._command != TrainerFn.PREDICTING:  # it needs no reward
            self.evaluator.fetch(test=self._command == TrainerFn.TESTING)

    @property
    def _command(self) -> TrainerFn | None:
        """What the trainer does; None without one."""
        return None if self._trainer is None else self._trainer.state.fn

    def setup(self, stage: str) -> None:
        """Checks the model's folder, finds the rewards' weights and derives the batch arithmetic."""
        check_precision(self.trainer)
        check_strategy(self.trainer.strategy)
        self.flow.validate()
        check_binding(self.flow, self.lora, self.lora_file)
        if self._is_loaded:
            check_same_file(self.lora_file, self._loaded_file)
        check_fits(self, stage)
        self.fetch_weights()
        if stage == "fit":
            derive_accumulation(self.trainer, self.plan)
            report_run(self.evaluator.mixtures, self.plan, self.batching.batch_size, self.trainer.default_root_dir)

    @property
    def plan(self) -> BatchPlan:
        """The arithmetic of an epoch on this trainer's devices."""
        return BatchPlan.derive(
            num_pairs=self.batching.num_pairs,
            updates_per_epoch=self.batching.updates_per_epoch,
            num_steps=self.sampling.num_steps,
            num_points_per_pair=self.batching.num_points_per_pair,
            batch_size=self.batching.batch_size,
            world_size=self.trainer.world_size,
        )

    def take_prompts(self, train: Sequence[Prompt], val: Sequence[Prompt], images_per_prompt: int) -> None:
        """Takes a command's prompts; raises ConfigurationError, with file and line, if a reward cannot score one."""
        self._prompts = [*train, *val]
        if self._command == TrainerFn.TESTING:
            self.evaluator.check_repeats(images_per_prompt)
        if self._command != TrainerFn.PREDICTING:  # it needs no reward
            check_prompts(self.rewards, self.evaluator.metrics, train, val)
        self.evaluator.expect(val)

    def configure_model(self) -> None:
        """Loads the model and makes its LoRA, or the whole transformer, trainable; a second call does nothing."""
        if self._is_loaded:
            return
        check_flow_is_new(self.flow)
        with torch.device("cpu"):  # not Lightning's default here, the accelerator: its random numbers are others
            if self._prompts:
                cache_texts(self.flow, self._prompts, self.sampling.guidance_scale, self.trainer)
            self._load()
        if self.device_mesh is not None:  # the strategy's, if it shards
            parallelize(self.flow.transformer, self.flow.blocks, self.device_mesh)
        compares = self._command == TrainerFn.TESTING and self.evaluation.base
        compares |= self._command != TrainerFn.PREDICTING and self.evaluator.needs_base
        if has_lora(self.flow.transformer) or compares:
            self.base = BaseWeights(self.flow.transformer)
        self._is_loaded, self._loaded_file = True, self.lora_file

    def _load(self) -> None:
        known = self.flow.outline() is not None
        load(self.flow, self.sampling.guidance_scale)
        if not known:
            check_fits(self, "fit" if self._command == TrainerFn.FITTING else "")
        self.dropout = SeededDropout(bind(self.flow, self.lora, self.lora_file, self.seed), self.seed)
        if self._command == TrainerFn.FITTING:
            check_trainable(self)

    def configure_optimizers(self) -> Any:
        return build_optimizers(self.optimizer, self.lr_scheduler, list(trainable(self).values()))

    def on_fit_start(self) -> None:
        self.to_device()

    def to_device(self) -> None:
        """Puts text encoders, VAE and rewards on the device; a second call does nothing."""
        if self._at != self.device:
            self.flow.to_device(self.device)
            self.evaluator.setup(self.device)
            self._at = self.device

    # Training

    def rollout_loader(self, prompts: Sequence[Prompt]) -> RolloutCollector:
        """The training loader: each epoch it rolls out pairs of `prompts` and yields their points."""
        self.collector = RolloutCollector(
            self.flow,
            self.rewards,
            prompts,
            self.plan,
            self.sampling,
            RunContext(self.trainer),
            seed=self.seed,
            algorithm=self.algorithm,
            adaptation=self.adaptation,
            pairs_per_prompt=self.batching.pairs_per_prompt,
            normalization=self.objective.normalization,
            rollout_batch_size=self.batching.rollout_batch_size,
            failures=self.failures,
        )
        return self.collector

    def on_train_batch_start(self, batch: TrajectoryPoints, batch_idx: int) -> None:
        if batch_idx == 0:
            check_accumulation(self.trainer, self.plan)
        self.dropout.switch(True)

    def training_step(self, batch: TrajectoryPoints, batch_idx: int) -> Tensor:
        """The objective, averaged over the batch: see `batch_loss`."""
        index = batch_idx * self.trainer.world_size + self.trainer.global_rank
        with self.dropout.seeded(self.current_epoch, index, self.device):
            velocity = self.velocity(batch)
        base_velocity = partial(self.base_velocity, batch)
        loss, logged = batch_loss(velocity, batch, self._point_loss, self.adaptation.kl_weight, base_velocity)
        self.log_means(logged, len(batch.sigma))
        self.batch = batch
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's; with a `trust_region`, its step is scaled back where that says so."""
        with within_trust_region(self):
            super().optimizer_step(*args, **kwargs)

    def velocity(self, batch: TrajectoryPoints) -> Tensor:
        """The flow's velocity at a batch's points, as the rollout takes it: [B, ...]."""
        return self.flow.velocity(batch.latents, batch.sigma, batch.conditioning, self.sampling.guidance_scale)

    def base_velocity(self, batch: TrajectoryPoints) -> Tensor:
        """The base model's velocity there: [B, ...]."""
        return cast(BaseWeights, self.base).velocity(batch.latents, partial(self.velocity, batch))

    def on_train_batch_end(self, outputs: Any, batch: TrajectoryPoints, batch_idx: int) -> None:
        self.dropout.switch(False)
        self.epoch_log.end_batch(self)

    def on_train_epoch_end(self) -> None:  # here, for the hooks of checkpoint callbacks come next
        self.epoch_log.write(self.trainer)

    def log_means(self, values: Mapping[str, Any], count: int) -> None:
        """Logs means over an epoch and over devices, see `EpochLog.add`."""
        self.epoch_log.add(self, values, count)
