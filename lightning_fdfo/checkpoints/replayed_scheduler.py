"""Applies the settings that win on a resume, and recomputes the schedule from step 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_fdfo.training.optimizer_settings import Groups, ResumedOptimizer, optimizer_groups


def apply_settings(
    optimizer: Optimizer, scheduler: LRScheduler | None, resumed: ResumedOptimizer,
    build: Callable[[Optimizer], Any] | None, num_steps: int,
) -> None:  # fmt: skip
    """Sets a restored optimiser, and its scheduler, to what counts; moments stay as they are.

    Args:
        optimizer: restored from the checkpoint.
        scheduler: the same; None without one.
        resumed: see `resumed_optimizer`.
        build: makes the configuration's scheduler of an optimiser.
        num_steps: optimiser steps so far.
    """
    values: Groups = [{name: group[name] for name in resumed.changed} for group in resumed.groups]
    if scheduler is not None and build is not None and resumed.replays:
        twin, groups = replayed(build, optimizer, resumed.groups, num_steps)
        scheduler.load_state_dict(twin.state_dict())
        values = groups
    elif not resumed.changed:
        return
    state = optimizer.state_dict()
    for group, new in zip(state["param_groups"], values, strict=True):
        group.update(new)
    optimizer.load_state_dict(state)


def replayed(
    build: Callable[[Optimizer], Any], optimizer: Optimizer, groups: Groups, num_steps: int
) -> tuple[LRScheduler, Groups]:
    """A scheduler as it is after some steps, and the groups of an optimiser under it, which has no weights.

    Args:
        build: makes the scheduler of an optimiser.
        optimizer: whose defaults it looks at.
        groups: settings at the first step.
        num_steps: how many, >= 0.

    Example:
        >>> weights = [torch.nn.Parameter(torch.zeros(1))]
        >>> sgd = torch.optim.SGD(weights, lr=1.0)
        >>> halve = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        >>> replayed(halve, sgd, optimizer_groups(sgd), 3)[1][0]["lr"]
        0.125
    """
    twin = Optimizer([{"params": [torch.zeros(0)], **group} for group in groups], optimizer.defaults)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # there is nothing to update
        scheduler: LRScheduler = build(twin)
        for _ in range(num_steps):
            scheduler.step()
    return scheduler, optimizer_groups(twin)
