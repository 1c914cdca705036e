"""FDFOModule: the LightningModule that owns flow, sampling settings and rewards; its training_step is the objective.

Lightning does the rest: accumulation, clipping, precision, strategies, loggers, checkpoints. Not here: the mathematics
(objective.py, sampling.py), the rollout (rollout/pairs.py), and hyper-parameters in checkpoints, which would silently
override a configuration on resume; the record of a run is its config.yaml.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_fdfo.checkpoints.checkpoint_io import check_settings, check_weights, check_whole, optimizer_tensors
from lightning_fdfo.checkpoints.resumed_settings import ResumedSettings
from lightning_fdfo.checkpoints.run_owner import RunOwner
from lightning_fdfo.data import IndexedPrompt
from lightning_fdfo.errors import ConfigurationError, DivergenceError
from lightning_fdfo.evaluation.comparison import Comparison, Painted, Row
from lightning_fdfo.evaluation.embedders import named_embedder
from lightning_fdfo.finite import check_saved, check_trained
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.generate import generate
from lightning_fdfo.flows.lora import LoRA, dropout_layers
from lightning_fdfo.flows.lora_contents import check_lora_file, describe_lora
from lightning_fdfo.flows.lora_files import add_lora, adopt_lora, check_lora
from lightning_fdfo.guards.capacity import check_capacity
from lightning_fdfo.guards.finite_weights import FiniteWeights, advice
from lightning_fdfo.guards.learning_guard import LearningGuard, check_trainable
from lightning_fdfo.guards.missing import missing_guards
from lightning_fdfo.guards.module import (
    COMPILED,
    check_flow_is_new,
    check_module,
    read_safely,
    say_where_it_begins,
)
from lightning_fdfo.guards.trainer import check_accumulation, guard
from lightning_fdfo.objective import velocity_divergence, velocity_objective
from lightning_fdfo.parallel import all_sum, check_strategy, parallelize, whole
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.randomness import Stream, generator
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.routing import check_route, is_for, routes
from lightning_fdfo.rollout.collector import RolloutCollector
from lightning_fdfo.rollout.devices import Devices
from lightning_fdfo.rollout.plan import BatchPlan
from lightning_fdfo.rollout.points import TrajectoryPoints
from lightning_fdfo.settings import Batching, Evaluation, FailurePolicy, Objective, Sampling, check_number
from lightning_fdfo.training.base_weights import BaseWeights, has_lora
from lightning_fdfo.training.optimizers import build_optimizer, build_scheduler, try_optimizer
from lightning_fdfo.training.summary import describe_model, describe_rewards

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Of the trainer's: those in which latents at rest, sigma and the objective stay float32."""


def _adamw(parameters: Iterable[Tensor]) -> Optimizer:
    """The paper's optimiser."""
    return AdamW(parameters, lr=3e-5, weight_decay=1e-4)


class FDFOModule(LightningModule):
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
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        failures: FailurePolicy = FailurePolicy(),  # noqa: B008 - frozen
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - frozen
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.rewards = RewardMix(rewards)
        self.metrics = RewardMix(evaluation.metrics) if evaluation.metrics else None
        self.sampling = sampling
        self.batching = batching
        self.objective = objective
        self.lora = lora
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.failures = failures
        self.evaluation = evaluation
        self.embedder = named_embedder(evaluation.diversity) if evaluation.diversity is not None else None
        self.seed = seed
        self.resume_overrides: frozenset[str] = frozenset()
        """On a resume these count, not the checkpoint's: settings of the optimiser (`lr`; `*`: all), `lr_scheduler`."""
        self.lora_file: Path | None = None
        """To validate, test or predict with instead of the configuration's LoRA."""
        self.comparison: list[Row] = []
        """What the last `test` has computed."""
        self.strict_loading = False  # a checkpoint holds what trains; check_weights is strict about that
        self._on_device: torch.device | None = None
        self._model_is_ready = False
        self._adopted: Path | None = None  # the LoRA file that it was loaded with
        self._texts: list[Prompt] = []
        self._dropouts: list[nn.Module] = []
        self._logged: set[str] = set()
        self.collector: RolloutCollector | None = None
        """The training loader, with scores and numbers of the last rollout; None before `fit`."""
        self._unjudged: set[str] = set()
        self.num_updates = 0
        """Optimiser steps of this `fit`, with those that were skipped because their gradient was not finite."""
        self.num_skipped = 0
        self._skipped_in_a_row = 0
        self.has_trained = False
        """Whether an earlier `fit`, or a checkpoint, has left its weights here."""
        self._base: BaseWeights | None = None
        self._comparison: Comparison | None = None
        taken = {"reward"} & set(self.rewards.terms)
        if self.metrics is not None:
            taken |= {"reward", *self.rewards.terms} & set(self.metrics.terms)
        if taken:
            raise ConfigurationError(
                f"rewards and metrics are logged by name: {sorted(taken)} would be two; rename one"
            )
        if objective.kl_weight and lora is None:
            raise ConfigurationError(
                "kl_weight needs the base model beside the trained one: use a LoRA, or kl_weight 0"
            )
        check_number("seed", seed, at_least=0)

    @classmethod
    def load_from_checkpoint(cls, *_: Any, **__: Any) -> NoReturn:
        """Raises ConfigurationError: a checkpoint holds what trains, and no settings to build a module of."""
        raise ConfigurationError(
            "FDFOModule.load_from_checkpoint: a checkpoint holds what trains and no settings: build the module, and "
            "give the file to trainer.fit, validate, test or predict as ckpt_path"
        )

    def compile(self, *_: Any, **__: Any) -> NoReturn:
        """Raises ConfigurationError: it would have no effect, for the Trainer calls the steps and never the module."""
        raise ConfigurationError(COMPILED)

    # Set-up: first all that needs no weights, then the model

    def configure_callbacks(self) -> list[Callback]:
        """Guards that every trainer of this module has, whatever its configuration names; each once.

        Refuses callbacks and settings that would change an update, before any hook of theirs.

        Raises:
            ConfigurationError: see `module_guard` and `trainer_guard`; or an optimiser or scheduler that cannot work.
        """
        check_module(self)
        read_safely(self.trainer)
        try:
            plan = self.plan if self._command == TrainerFn.FITTING else None
        except ConfigurationError:
            self.check_fits("fit")  # that a number is far too large comes before what it would have to divide by
            raise
        guard(self.trainer, plan)
        if plan is not None:
            num_updates = max(self.trainer.max_epochs or 0, 0) * self.batching.updates_per_epoch
            try_optimizer(self.optimizer, self.lr_scheduler, num_updates, self.trainer.strategy.root_device)
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        kinds = (RunOwner, FiniteWeights, ResumedSettings, LearningGuard)
        return [*(kind() for kind in kinds if kind not in present), *missing_guards(self.trainer)]

    def prepare_data(self) -> None:
        """Fetches the rewards' weights, on one process of each machine; what fails is told in `setup`, by all alike."""
        with suppress(ConfigurationError):
            self.flow.validate()
            self.flow.outline()  # a model that cannot be had: no need to fetch gigabytes for its rewards
            self.fetch_weights()

    def fetch_weights(self) -> None:
        """Finds the weights of rewards, metrics and, for `test`, the embedder; fetches what is missing."""
        if self._command == TrainerFn.PREDICTING:  # it needs no reward
            return
        self.rewards.fetch()
        if self.metrics is not None:
            self.metrics.fetch()
        if self.embedder is not None and self._command == TrainerFn.TESTING:
            self.embedder.fetch()

    @property
    def _command(self) -> TrainerFn | None:
        """What the trainer does; None without one."""
        return None if self._trainer is None else self._trainer.state.fn

    def setup(self, stage: str) -> None:
        """Checks the model's folder, finds the rewards' weights and derives the batch arithmetic."""
        if self.trainer.precision not in PRECISIONS:
            raise ConfigurationError(
                f"trainer.precision={self.trainer.precision}: expected one of {', '.join(PRECISIONS)}; "
                "the frozen weights have a dtype of their own, model.flow.init_args.dtype"
            )
        check_strategy(self.trainer.strategy)
        self.flow.validate()
        if self.lora is None:
            self.flow.check_trains_all()
        if self.lora is not None and self.lora.init_lora is not None:
            check_lora_file(Path(self.lora.init_lora), "lora.init_lora")
            check_lora(self.flow, Path(self.lora.init_lora))
        if self._model_is_ready and self.lora_file != self._adopted:
            raise ConfigurationError(
                "module.lora_file: it is read when the model is loaded, and this module's is loaded already; set it on "
                "a new module"
            )
        if self.lora_file is not None:
            check_lora(self.flow, self.lora_file)
        self.check_fits(stage)
        if stage == "test" and self.embedder is not None:
            images = getattr(self.trainer.datamodule, "images_per_prompt", None)  # type: ignore[attr-defined]
            if images == 1:
                raise ConfigurationError("evaluation.diversity: expected data.images_per_prompt of at least 2, got 1")
        self.fetch_weights()
        if stage == "fit":
            plan = self.plan
            given, derived = self.trainer.accumulate_grad_batches, plan.batches_per_update
            if given not in (1, derived):
                raise ConfigurationError(
                    f"trainer.accumulate_grad_batches={given}: leave it out, it is derived (here {derived})"
                )
            self.trainer.accumulate_grad_batches = derived
            rank_zero_info(describe_rewards(self.rewards.terms, {} if self.metrics is None else self.metrics.terms))
            rank_zero_info(f"Plan: {plan}")
            rank_zero_info(f"Folder: {self.trainer.default_root_dir}")

    def check_fits(self, stage: str) -> None:
        """Raises ConfigurationError for sizes, ranks and counts that the model or the memory here cannot take.

        Before the model is loaded, if the flow has an outline of it; else once it is.
        """
        transformer = getattr(self.flow, "transformer", None) or self.flow.outline()
        if transformer is not None and not has_lora(transformer):
            check_capacity(self, transformer, fit=stage == "fit")

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

    def check_prompts(self, train: Sequence[Prompt], val: Sequence[Prompt]) -> None:
        """Raises ConfigurationError, with file and line, if a prompt goes to a reward that cannot score it."""
        self._texts = [*train, *val]
        if self._command == TrainerFn.PREDICTING:  # it needs no reward
            return
        mixes = [(self.rewards, [*train, *val])] + ([] if self.metrics is None else [(self.metrics, list(val))])
        names = [name for mix, _ in mixes for name in mix.terms]
        for mix, prompts in mixes:
            for prompt in prompts:
                try:
                    check_route(prompt.metadata, self.rewards.terms, names)
                    own = [name for name in mix.terms if is_for(name, prompt.metadata)]
                    mix.check(prompt.text, prompt.metadata, own)
                except ConfigurationError as error:
                    raise ConfigurationError(f"{prompt.source}: {error}") from error
        self._unjudged = {name for name in names if not any(is_for(name, prompt.metadata) for prompt in val)}

    def configure_model(self) -> None:
        """Loads the model and makes its LoRA, or the whole transformer, trainable; a second call does nothing."""
        if self._model_is_ready:
            return
        check_flow_is_new(self.flow)
        # Lightning's default device here is the accelerator: what is drawn at random would not be the CPU's.
        with torch.device("cpu"):
            self._cache_texts()
            self._load()
        if self.device_mesh is not None:  # the strategy's, if it shards
            parallelize(self.flow.transformer, self.flow.blocks, self.device_mesh)
        if self._command == TrainerFn.TESTING and self.evaluation.base:
            self._base = BaseWeights(self.flow.transformer)
        self._model_is_ready, self._adopted = True, self.lora_file

    def _load(self) -> None:
        known = self.flow.outline() is not None
        rank_zero_info(describe_model(self.flow))
        self.flow.load()
        if not known:
            self.check_fits("fit" if self._command == TrainerFn.FITTING else "")
        if self.flow.guidance == "none" and self.sampling.guidance_scale != 1.0:
            raise ConfigurationError(
                f"sampling.guidance_scale: expected 1, got {self.sampling.guidance_scale}: this model has no guidance"
            )
        # Eval mode is meant: rollout and training must see the same velocities.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
        if self.lora_file is not None:
            adopted = adopt_lora(self.flow, self.lora_file)
            layers = describe_lora(self.flow.transformer, self.flow.lora_targets)
            rank_zero_info(f"LoRA of rank {adopted.rank} on {layers}, from {self.lora_file}")
        elif self.lora is not None:
            bound = add_lora(self.flow, self.lora, self.seed)
            self._dropouts = dropout_layers(self.flow.transformer)
            rank_zero_info(f"LoRA of rank {self.lora.rank} on {len(bound)} layers")
        else:
            self.flow.train_all()
        if self._command == TrainerFn.FITTING:
            check_trainable(self)

    def _cache_texts(self) -> None:
        """Lets the flow encode all texts now, if it caches them."""
        if not self._texts:
            return
        negatives = self.flow.uses_negatives(self.sampling.guidance_scale)
        with self.trainer.precision_plugin.forward_context():
            self.flow.prepare_texts(
                [prompt.text for prompt in self._texts],
                [prompt.negative for prompt in self._texts] if negatives else [],
                self.trainer.strategy.root_device,
                rank=self.trainer.global_rank,
                world_size=self.trainer.world_size,
                barrier=self.trainer.strategy.barrier,
            )

    def configure_optimizers(self) -> Any:
        """The optimiser of the trainable weights, and the scheduler, stepped after each update."""
        optimizer = build_optimizer(self.optimizer, list(self._trainable().values()))
        if self.lr_scheduler is None:
            return optimizer
        scheduler = build_scheduler(self.lr_scheduler, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Puts text encoders, VAE and rewards on the device."""
        self.has_trained = self.has_trained or self.num_updates > 0
        self.num_updates = self.num_skipped = self._skipped_in_a_row = 0
        self.place()

    def on_train_start(self) -> None:
        """Says so if the run begins from trained weights."""
        say_where_it_begins(self)

    def on_validation_start(self) -> None:
        """The same, for `validate` alone."""
        self.place()

    def place(self) -> None:
        """Puts text encoders, VAE and rewards on the device; a second call does nothing."""
        if self._on_device == self.device:
            return
        self.flow.to_device(self.device)
        self.rewards.setup(self.device)
        if self.metrics is not None:
            self.metrics.setup(self.device)
        self._on_device = self.device

    # Rollouts

    def rollout_loader(self, prompts: Sequence[Prompt]) -> RolloutCollector:
        """The training loader: each epoch it rolls out pairs of `prompts` and yields their points."""
        self.collector = RolloutCollector(
            self.flow,
            self.rewards,
            prompts,
            self.plan,
            self.sampling,
            Devices(self.trainer),
            seed=self.seed,
            normalization=self.objective.normalization,
            rollout_batch_size=self.batching.rollout_batch_size,
            failures=self.failures,
        )
        return self.collector

    # Training

    def on_train_batch_start(self, batch: TrajectoryPoints, batch_idx: int) -> None:
        """Logs the numbers of the epoch's rollout, which lies behind its first batch; switches dropout on."""
        if batch_idx == 0:
            drift = {"train/drift": self._drift(batch)} if self.lora is not None else {}
            check_accumulation(self.trainer, self.plan)
            metrics = cast(RolloutCollector, self.collector).metrics
            self._log_epoch(metrics | drift, 1)
            if not self.trainer.barebones:
                self.log("mean_reward", metrics["reward/mean"], prog_bar=True, logger=False)
        self._switch_dropout(True)

    def _drift(self, batch: TrajectoryPoints) -> Tensor:
        """How far the rollout's velocity has left the base model's, as a share of it: rms(v - v_base) / rms(v_base)."""
        with self.trainer.precision_plugin.forward_context():
            base = self._base_velocity(batch)
        left, size = (
            velocity_divergence(velocity, base).sum() for velocity in (batch.old_velocity, torch.zeros_like(base))
        )
        sums = all_sum(self.trainer, torch.stack([left, size])).double()  # on the CPU: not every device has float64
        return (sums[0] / sums[1]).sqrt().float()

    def training_step(self, batch: TrajectoryPoints, batch_idx: int) -> Tensor:
        """The objective, averaged over the batch."""
        with self._seeded_dropout(batch_idx):
            velocity = self.velocity(batch)
        loss, ratio = velocity_objective(
            velocity, batch.old_velocity, batch.direction, batch.reward_difference, clip_range=self.objective.clip_range
        )
        mean_loss = loss.mean()
        logged = {
            "ratio": ratio.mean(),
            "clip_fraction": ((ratio - 1).abs() > self.objective.clip_range).float().mean(),
        }
        if self.objective.kl_weight:
            divergence = velocity_divergence(velocity, self._base_velocity(batch)).mean()
            mean_loss = mean_loss + self.objective.kl_weight * divergence
            logged["divergence"] = divergence
        self._log_epoch({f"train/{name}": value for name, value in {"loss": mean_loss, **logged}.items()}, len(loss))
        return mean_loss

    @contextmanager
    def _seeded_dropout(self, batch_idx: int) -> Iterator[None]:
        """The LoRA's dropout draws by seed, epoch, batch and device, and leaves the global generators as they were."""
        if not self._dropouts:
            yield
            return
        index = batch_idx * self.trainer.world_size + self.trainer.global_rank
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(generator(Stream.DROPOUT, self.seed, self.current_epoch, index).initial_seed())
            yield

    def _switch_dropout(self, on: bool) -> None:
        """On from a batch's start to its end, for checkpointed blocks run again in the backward pass."""
        for layer in self._dropouts:
            layer.train(on)

    def velocity(self, batch: TrajectoryPoints) -> Tensor:
        """The flow's velocity at a batch's points, as the rollout takes it: [B, ...]."""
        return self.flow.velocity(batch.latents, batch.sigma, batch.conditioning, self.sampling.guidance_scale)

    @torch.no_grad()
    def _base_velocity(self, batch: TrajectoryPoints) -> Tensor:
        self.flow.transformer.disable_adapters()  # type: ignore[operator]
        try:
            return self.velocity(batch)
        finally:
            self.flow.transformer.enable_adapters()  # type: ignore[operator]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the gradient's norm before clipping, and the learning rate; leaves out a gradient that is not finite."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = whole({"norm": torch.nn.utils.get_total_norm(gradients)})["norm"]
        finite = bool(norm.isfinite())
        self.num_updates += 1
        self.num_skipped += not finite
        if finite or self.trainer.precision == "16-mixed":  # whose scaler skips by itself
            self._skipped_in_a_row = 0
        else:
            self._skip(norm)
        logged = {"train/learning_rate": optimizer.param_groups[0]["lr"], "train/skipped": float(not finite)}
        self._log_epoch(logged | ({"train/grad_norm": norm} if finite else {}), 1)

    def _skip(self, norm: Tensor) -> None:
        """Takes the gradients away: optimisers pass over weights without one."""
        for parameter in self.parameters():
            parameter.grad = None
        self._skipped_in_a_row += 1
        told = f"update {self.trainer.global_step}: the gradient's norm is {norm.item()}"
        if self._skipped_in_a_row > self.failures.max_skipped:
            raise DivergenceError(
                f"{told}, as for {self.failures.max_skipped} updates before it; {advice(self.trainer)}"
            )
        warnings.warn(f"{told}: it is skipped", stacklevel=2)

    def on_train_batch_end(self, outputs: Any, batch: TrajectoryPoints, batch_idx: int) -> None:
        """Logs the speed of training, after an epoch's last batch; switches dropout off."""
        self._switch_dropout(False)
        if self.trainer.is_last_batch:
            points = self.plan.num_pairs * self.plan.points_per_pair
            seconds = time.perf_counter() - cast(RolloutCollector, self.collector).end
            self._log_epoch({"train/points_per_second": points / seconds}, 1)

    def on_train_epoch_end(self) -> None:
        """Writes the epoch's numbers to the loggers: here, for Lightning would do it after the epoch's checkpoint.

        A run killed between the two would go on without them.
        """
        metrics = self.trainer.callback_metrics
        row = {name: metrics[name].item() for name in sorted(self._logged)} | {"epoch": self.current_epoch}
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step=self.trainer.global_step - 1)
            logger.save()
        self._logged.clear()  # names come and go: a share, an agreement

    def _log_epoch(self, values: Mapping[str, Any], batch_size: int) -> None:
        """Logs means over an epoch and over devices; those of training reach the loggers by `on_train_epoch_end`."""
        if self.trainer.barebones:  # it logs nothing, and would warn of each number
            return
        training = self.trainer.training
        if training:
            self._logged.update(values)
        devices = self.trainer.world_size
        # Lightning divides the number of images by that of devices, in whole numbers: made divisible, it loses nothing.
        self.log_dict(
            dict(values),
            logger=False if training else None,
            on_step=False,
            on_epoch=True,
            batch_size=batch_size * devices,
            sync_dist=devices > 1,
        )

    # Validation

    def validation_step(self, batch: list[IndexedPrompt], batch_idx: int) -> dict[str, Any]:
        """Paints the prompts from fixed latents without churn and scores them.

        Returns:
            `images` [N, 3, H, W], `prompts`, and `scores`: name -> `Scores` of those that count, in float32, for
            callbacks. The total, `reward`, is left out before the first rollout if a term is divided by its deviation:
            nobody knows it yet. A name that no validation prompt goes to is left out.
        """
        images, scores = self._painted(batch)
        prompts = [row.prompt.text for row in batch if row.counted]
        count = len(prompts)  # the others come last
        scores = {name: score.select(slice(count)).rounded() for name, score in scores.items()}
        for name, score in scores.items():
            scored = score.values[score.scored]
            self._log_epoch({f"val/{name}": scored.mean() if len(scored) else torch.zeros(())}, len(scored))
        return {"images": images[:count].cpu(), "prompts": prompts, "scores": scores}

    def _painted(self, batch: Sequence[IndexedPrompt]) -> Painted:
        """Images of all rows, and their scores."""
        images = self._paint(batch)
        texts, metadata = [row.prompt.text for row in batch], [row.prompt.metadata for row in batch]
        drop = self.failures.drops_pairs
        terms = self.rewards(images, texts, metadata, routes=routes(self.rewards.terms, metadata), drop=drop)
        known = self.rewards.scales_known
        scores = ({"reward": self.rewards.total(terms, self.current_epoch)} if known else {}) | terms
        if self.metrics is not None:
            scores |= self.metrics(images, texts, metadata, routes=routes(self.metrics.terms, metadata), drop=drop)
        return Painted(images, {name: value for name, value in scores.items() if name not in self._unjudged})

    def _paint(self, batch: Sequence[IndexedPrompt]) -> Tensor:
        return generate(
            self.flow,
            [row.prompt for row in batch],
            [row.place for row in batch],
            seed=self.seed,
            sampling=self.sampling,
            device=self.device,
            repeats=[row.repeat for row in batch],
        )

    # Test and prediction

    def on_test_start(self) -> None:
        """Puts all on the device, and begins to compare.

        Raises:
            ConfigurationError: the whole transformer has been trained already, and the base's weights are gone.
        """
        self.place()
        if self.embedder is not None:
            self.embedder.setup(self.device)
        if self.evaluation.base and self._base is None:
            if not has_lora(self.flow.transformer):
                raise ConfigurationError(
                    "evaluation.base: the whole transformer has been trained, and the base's weights are gone; "
                    "test a new module with ckpt_path, or set evaluation.base false"
                )
            self._base = BaseWeights(self.flow.transformer)
        mixes = [self.rewards] if self.metrics is None else [self.rewards, self.metrics]
        better = {name: reward.higher_is_better for mix in mixes for name, reward in mix.rewards.items()}
        self._comparison = Comparison(self.evaluation, {"reward": True} | better, self.embedder, self.seed, self.device)

    def test_step(self, batch: list[IndexedPrompt], batch_idx: int) -> None:
        """Paints the prompts by the weights that are judged and by the base's, from the same latents; compares."""
        tuned, base = self._painted(batch), None
        if self.evaluation.base and self._base is not None:
            with self._base.in_place():
                base = self._painted(batch)
        cast(Comparison, self._comparison).update([row.place for row in batch if row.counted], tuned, base)

    def on_test_epoch_end(self) -> None:
        """Computes all numbers over all devices, for `comparison`, and logs the means as `test/NAME`."""
        self.comparison = cast(Comparison, self._comparison).compute()
        means = {f"test/{row.name}": row.tuned.mean for row in self.comparison}
        self.log_dict(means, sync_dist=self.trainer.world_size > 1)

    def on_predict_start(self) -> None:
        """Puts text encoders and VAE on the device."""
        self.flow.to_device(self.device)

    def predict_step(self, batch: list[IndexedPrompt], batch_idx: int) -> dict[str, Any]:
        """Paints the prompts: `images` [N, 3, H, W] on the CPU, and their `rows`, of those that count."""
        rows = [row for row in batch if row.counted]
        return {"images": self._paint(batch)[: len(rows)].cpu(), "rows": rows}

    # Checkpoints: only what trains

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trainable weights only, notes what they mean nothing without, and adds the rewards' scales.

        Raises:
            DivergenceError: a weight is not finite; no file is written.
        """
        checkpoint["fdfo"] = {**checkpoint.get("fdfo", {}), **self._identity()}
        checkpoint["shapes"] = self._shapes()
        checkpoint["reward_scales"] = self.rewards.state_dict()
        weights = checkpoint["state_dict"]  # empty but on the first process, where weights are sharded
        checkpoint["state_dict"] = {name: weights[name] for name in self._trainable() if name in weights}
        check_trained(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is this module's.

        Raises:
            ConfigurationError: the checkpoint's trainable weights, LoRA scale or seed are not this module's, or a
                number in it is not finite.
        """
        settings = self._identity()
        if not self.trainer.training:
            settings.pop("seed")  # judging weights with other latents is fine, going on with others is not
        else:
            check_whole(checkpoint, self.trainer.ckpt_path)
        check_settings(checkpoint.get("fdfo", {}), settings)
        self.has_trained = True
        self.rewards.load_state_dict(checkpoint.get("reward_scales", {}))
        check_weights(checkpoint.get("shapes", {}), self._shapes())
        if "state_dict" in checkpoint:  # where weights are sharded, the strategy has loaded it already
            check_weights({name: value.shape for name, value in checkpoint["state_dict"].items()}, self._shapes())
        check_saved(checkpoint.get("state_dict") or self._trainable(), "weights")
        if self.trainer.training:
            check_saved(optimizer_tensors(checkpoint), "optimiser's state")

    def _identity(self) -> dict[str, float | None]:
        """Settings that a checkpoint's weights depend on, beside their names and shapes."""
        names = ("rank", "alpha", "rslora", "dora")
        return {"seed": self.seed, **{f"lora.{name}": getattr(self.lora, name, None) for name in names}}

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self._trainable().items()}

    def _trainable(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
