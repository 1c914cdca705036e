"""EMA: a moving average of the weights that train, and of nothing else; validation and export see the average.

Lightning's own EMAWeightAveraging copies frozen weights too, and saves the average where the weights should be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.finite import check_finite_checkpoint
from lightning_fdfo.parallel import placed_as
from lightning_fdfo.settings import check_number
from lightning_fdfo.training.trained_state import trainable


class EMA(Callback):
    """Exponential moving average of the trainable weights, in float32, updated after each optimiser step n = 0, 1, ….

        d       = min(decay, (1 + n) / (10 + n)) with warm-up, else decay
        average = d * average + (1 - d) * weights

    It starts as the weights before the first step. Validation runs with it; training uses the weights themselves, and
    so do rollouts, unless `rollouts` is on. A checkpoint keeps both: the weights where they always are, the average in
    the callback's entry. `LoRAExport` writes both, see there. A run that resumes from a checkpoint without an average
    starts one there.

    Args:
        decay: in (0, 1).
        warmup: lets the average follow closely at first.
        rollouts: the average generates the rollouts too. It changes slowly, and so does what it generates: the weights
            are pulled from where it is, and `objective.clip_range` bounds how far they may be from it, also with one
            update an epoch. `train/drift` is then the average's.

    Raises:
        ConfigurationError: `decay` is out of range; on load, if a checkpoint's average is of other weights.

    Example:
        >>> ema = EMA(decay=0.99)
        >>> ema.decay_after(0), ema.decay_after(10), ema.decay_after(10_000)
        (0.1, 0.55, 0.99)
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True, rollouts: bool = False) -> None:
        check_number("EMA: decay", decay, above=0, below=1)
        self.decay = decay
        self.warmup = warmup
        self.rollouts = rollouts
        self.num_updates = 0
        self.average: dict[str, Tensor] = {}
        """Of each trainable weight, by its name in the module; empty before training."""
        self._step = 0
        self._raw: dict[str, Tensor] = {}
        self._hook: RemovableHandle | None = None

    def decay_after(self, num_updates: int) -> float:
        """The decay of the next update."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.warmup else self.decay

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The average, unsharded on every process, and how many steps it has seen."""
        average = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in self.average.items()}
        return {"num_updates": self.num_updates, "average": average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_updates, self.average = state_dict["num_updates"], dict(state_dict["average"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises ConfigurationError if the checkpoint's average is of other weights than those here, or not finite."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            rank_zero_info("EMA: the checkpoint holds no average; one starts from its weights")
        else:
            _check(state["average"], pl_module)
            check_finite_checkpoint(state["average"], "EMA's average")

    def restart(self, pl_module: LightningModule) -> None:
        """Begins a new average from the weights as they are."""
        self.average, self.num_updates = {}, 0
        self._start(pl_module)

    # Updates

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the average, or brings a checkpoint's to the device."""
        self._start(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)
        self._step = trainer.global_step

    @torch.inference_mode(False)
    @torch.no_grad()
    def _start(self, pl_module: LightningModule) -> None:
        if self.average:
            _check(self.average, pl_module)
        self.average = {
            name: placed_as(self.average.get(name, p), p, torch.float32) for name, p in trainable(pl_module).items()
        }

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Updates the average if this batch has ended in an optimiser step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        share = 1 - self.decay_after(self.num_updates)
        for name, parameter in trainable(pl_module).items():
            self.average[name].lerp_(parameter.float(), share)
        self.num_updates += 1

    # Rollouts

    def on_rollout_batch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the average in before a rollout's first batch, if it is to generate it."""
        if self.rollouts and self.num_updates and not self._raw:
            self._swap_in(pl_module)

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Swaps the weights back, before they train."""
        self._swap_back(pl_module)

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the average in; a checkpoint that is written meanwhile still holds the weights."""
        if not self.num_updates:
            return
        if trainer.state.fn != TrainerFn.FITTING:  # nothing else has brought a checkpoint's average to the device
            self._start(pl_module)
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the weights back, before checkpoint callbacks, which are always last, write them."""
        self._swap_back(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_back(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Swaps the weights back if validation did not come to its end."""
        self._swap_back(pl_module)

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """While it is open, the module's trainable weights are their average (rounded to their dtype)."""
        if self._raw or not self.average:  # they are already, or have not been trained
            yield
            return
        self._swap_in(pl_module)
        try:
            yield
        finally:
            self._swap_back(pl_module)

    @torch.no_grad()
    def _swap_in(self, pl_module: LightningModule) -> None:
        weights = trainable(pl_module)
        self._raw = {name: parameter.detach().clone() for name, parameter in weights.items()}
        for name, parameter in weights.items():
            parameter.copy_(self.average[name])

        def put_raw(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
            state_dict.update({prefix + name: value for name, value in self._raw.items()})

        self._hook = pl_module.register_state_dict_post_hook(put_raw)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _swap_back(self, pl_module: LightningModule) -> None:
        weights = trainable(pl_module) if self._raw else {}
        for name, parameter in weights.items():
            parameter.copy_(self._raw[name])
        self._raw = {}
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _check(average: Mapping[str, Tensor], pl_module: LightningModule) -> None:
    weights = trainable(pl_module)
    for name in sorted(set(average) | set(weights)):
        has, needs = (tuple(values[name].shape) if name in values else "nothing" for values in (average, weights))
        if has != needs:
            raise ConfigurationError(
                f"EMA: the average is of other weights: it has {has} for {name}, expected {needs}; "
                "use the configuration that its checkpoint was written with"
            )
