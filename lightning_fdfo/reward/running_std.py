"""The running standard deviation by which a mixture's `scale: std` divides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class RunningStd:
    """Standard deviation of a reward's half differences, over all pairs of all epochs so far and all devices.

        std = sqrt(sum d^2 / count)

    Half differences need no mean subtracted: those of a pair are d and -d. An epoch that is rolled out again after a
    resume replaces itself, so that nothing counts twice.

    Example:
        >>> import torch
        >>> running = RunningStd()
        >>> running.update(0, torch.tensor([3.0, -3.0, 0.0, 0.0]))
        >>> running.std
        2.1213203435596424
    """

    def __init__(self) -> None:
        self.epoch = -1
        self.before = (0.0, 0.0)
        """count and sum of squares without the last epoch"""
        self.total = (0.0, 0.0)
        """count and sum of squares"""

    @property
    def std(self) -> float | None:
        """> 0: None before the first epoch, 1 while all pairs have been ties."""
        count, squares = self.total
        if not count:
            return None
        return (squares / count) ** 0.5 if squares else 1.0

    def update(self, epoch: int, differences: Tensor) -> None:
        """Adds an epoch's half differences, [2P] of all devices."""
        if epoch != self.epoch:
            self.epoch, self.before = epoch, self.total
        squares = differences.double().pow(2).sum().item()
        self.total = (self.before[0] + len(differences), self.before[1] + squares)

    def state_dict(self) -> dict[str, Any]:
        """Counts and sums of squares, with and without the last epoch, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self.epoch, self.before, self.total = state["epoch"], tuple(state["before"]), tuple(state["total"])
