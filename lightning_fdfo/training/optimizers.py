"""The optimiser and its scheduler: tried on a small weight before a model is loaded, then built for what trains."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_fdfo.errors import ConfigurationError

MAX_TRIED_STEPS = 10_000
"""Of a scheduler, in a fifth of a second."""


def paper_adamw(parameters: Iterable[Tensor]) -> Optimizer:
    """The paper's optimiser: AdamW with a learning rate of 3e-5 and a weight decay of 1e-4."""
    return AdamW(parameters, lr=3e-5, weight_decay=1e-4)


def build_optimizer(make: Callable[[Sequence[Tensor]], Optimizer], parameters: Sequence[Tensor]) -> Optimizer:
    """The optimiser of some parameters.

    Args:
        make: from parameters to an optimiser.
        parameters: those that train.

    Raises:
        ConfigurationError: its class refuses its options, or these parameters.

    Example:
        >>> build_optimizer(partial(torch.optim.AdamW, lr=-1), [nn.Parameter(torch.zeros(1))])
        Traceback (most recent call last):
        lightning_fdfo.errors.ConfigurationError: model.optimizer: AdamW: Invalid learning rate: -1
    """
    with _named("model.optimizer", make):
        return make(parameters)


def build_scheduler(make: Callable[[Optimizer], Any], optimizer: Optimizer) -> LRScheduler:
    """The scheduler of an optimiser.

    Args:
        make: from an optimiser to a scheduler, which is stepped after each update.
        optimizer: its optimiser.

    Raises:
        ConfigurationError: its class refuses its options, or it waits for a measured number.
    """
    with _named("model.lr_scheduler", make):
        scheduler: LRScheduler = make(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigurationError(
            "model.lr_scheduler: ReduceLROnPlateau follows a measured number, which is known only after an epoch's "
            "checkpoint is written, so that a run could not resume exactly; use one that counts updates, "
            "CosineAnnealingLR say"
        )
    return scheduler


def try_optimizer(
    make: Callable[[Sequence[Tensor]], Optimizer],
    make_scheduler: Callable[[Optimizer], Any] | None,
    num_updates: int,
    device: torch.device,
) -> None:
    """Builds both on a weight of its own, and steps them: before any model is loaded.

    Args:
        make: from parameters to an optimiser.
        make_scheduler: from an optimiser to a scheduler; None for none.
        num_updates: of the run; at most `MAX_TRIED_STEPS` are tried with the scheduler.
        device: the trainer's, on which some optimisers depend.

    Raises:
        ConfigurationError: one of them cannot work; the message names it.

    Example:
        >>> try_optimizer(torch.optim.SparseAdam, None, 1, torch.device("cpu"))
        Traceback (most recent call last):
        lightning_fdfo.errors.ConfigurationError: model.optimizer: SparseAdam: SparseAdam does not support dense ...
    """
    weight = nn.Parameter(torch.zeros(2, 2, device=device))
    optimizer = build_optimizer(make, [weight])
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigurationError(
            f"model.optimizer: {type(optimizer).__name__} evaluates the loss several times a step, and an update is "
            "accumulated from batches that are gone by then; use a first-order one, AdamW say"
        )
    for name, value in optimizer.param_groups[0].items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigurationError(
                f"model.optimizer: {type(optimizer).__name__}: {name}: expected a finite number, got {value}"
            )
    scheduler = None if make_scheduler is None else build_scheduler(make_scheduler, optimizer)
    weight.grad = torch.zeros_like(weight)
    with _named("model.optimizer", make), torch.random.fork_rng(devices=[]):
        optimizer.step()
    if scheduler is not None and make_scheduler is not None:
        with _named("model.lr_scheduler", make_scheduler):
            for _ in range(min(num_updates, MAX_TRIED_STEPS)):
                scheduler.step()


@contextmanager
def _named(option: str, make: Callable[..., Any]) -> Iterator[None]:
    """Whatever a class of somebody else's raises becomes one sentence that names the option and the class."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise ConfigurationError(f"{option}: {_class_name(make)}: {reason}") from error


def _class_name(make: Callable[..., Any]) -> str:
    """Of what a partial, also jsonargparse's own, makes.

    Example:
        >>> _class_name(partial(torch.optim.AdamW, lr=1))
        'AdamW'
    """
    if isinstance(make, partial):
        named = [part for part in (make.func, *make.args) if inspect.isclass(part)]
        return named[0].__name__ if named else _class_name(make.func)
    return getattr(make, "__name__", type(make).__name__)


def build_optimizers(
    optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None, parameters: list[Tensor]
) -> Optimizer | dict[str, Any]:
    """The optimiser of what trains, and the scheduler, stepped after each update: for `configure_optimizers`."""
    built = build_optimizer(optimizer, parameters)
    if lr_scheduler is None:
        return built
    return {"optimizer": built, "lr_scheduler": {"scheduler": build_scheduler(lr_scheduler, built), "interval": "step"}}
