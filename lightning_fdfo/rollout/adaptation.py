"""Adaptation: numbers that a run moves as it learns, from what its rollouts show; part of each checkpoint.

Each is a function of the epochs so far: an epoch that is rolled out again after a resume replaces itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_fdfo.reward.running_std import RunningStd
from lightning_fdfo.schedules import AdaptiveChurn
from lightning_fdfo.settings import Objective, Sampling

KL_FACTORS = (1 / 8, 64.0)
"""Between which a `kl_target` may move the KL term's weight."""


class SteeredNumber:
    """A number that each epoch may move.

    Args:
        start: its value until it is moved.

    Example:
        >>> number = SteeredNumber(1.0)
        >>> number.steer(epoch=0, value=2.0)
        >>> number.before(0), number.before(1), number.value
        (1.0, 2.0, 2.0)
    """

    def __init__(self, start: float) -> None:
        self.epoch = -1
        self.value = start
        """After the last epoch that moved it."""
        self._previous = start

    def before(self, epoch: int) -> float:
        """Its value before an epoch moves it, also where that one is rolled out again."""
        return self._previous if epoch == self.epoch else self.value

    def steer(self, epoch: int, value: float) -> None:
        """Moves it, in an epoch."""
        self._previous, self.epoch, self.value = self.before(epoch), epoch, value

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"epoch": self.epoch, "value": self.value, "previous": self._previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.epoch, self.value, self._previous = state["epoch"], state["value"], state["previous"]


class Adaptation:
    """What a run adapts: the factor of an `AdaptiveChurn`, the scale of the total reward, the weight of the KL term.

    Args:
        sampling: its churn may be adaptive.
        objective: its `reward_scale`, `reward_clip`, `kl_weight` and `kl_target`.

    Example:
        >>> adaptation = Adaptation(Sampling(churn=AdaptiveChurn(target_distance=0.2)), Objective())
        >>> adaptation.steer_churn(epoch=0, distance=0.4)
        >>> adaptation.churn_factor(0), adaptation.churn_factor(1)
        (1.0, 0.5)
    """

    def __init__(self, sampling: Sampling, objective: Objective) -> None:
        self._sampling = sampling
        self._objective = objective
        self._factor = SteeredNumber(1.0)
        self._kl = SteeredNumber(1.0)
        self._std = RunningStd()
        adapted: dict[str, tuple[bool, SteeredNumber | RunningStd]] = {
            "churn_factor": (isinstance(sampling.churn, AdaptiveChurn), self._factor),
            "kl_factor": (objective.kl_target is not None, self._kl),
            "reward_std": (objective.reward_scale == "std", self._std),
        }
        self._parts = {name: part for name, (is_adapted, part) in adapted.items() if is_adapted}

    # Churn

    def churn_factor(self, epoch: int) -> float:
        """What an epoch's churn is multiplied by: 1 unless it is adaptive."""
        return self._factor.before(epoch)

    def steer_churn(self, epoch: int, distance: float) -> None:
        """Moves the factor after an epoch's rollout, see `AdaptiveChurn`.

        Args:
            epoch: the current one.
            distance: `rollout/pair_distance`, of all devices.
        """
        churn = self._sampling.churn
        if isinstance(churn, AdaptiveChurn):
            self._factor.steer(epoch, churn.next_factor(self.churn_factor(epoch), distance))

    # The total's half differences

    def scale(self, epoch: int, difference: Tensor, kept: Tensor) -> Tensor:
        """Half differences of the total as they train: over their running deviation, and clipped, as `Objective` says.

        Args:
            epoch: the current one.
            difference: [2P], of all devices.
            kept: [2P], bool; the others count for no deviation.
        """
        if self._objective.reward_scale == "std":
            self._std.update(epoch, difference[kept])
        clip, difference = self._objective.reward_clip, self.scaled(difference)
        return difference if clip is None else difference.clamp(-clip, clip)

    def scaled(self, values: Tensor) -> Tensor:
        """Differences or gradients of the total over the running deviation, where `reward_scale` asks for it."""
        return values / (self._std.std or 1.0) if self._objective.reward_scale == "std" else values

    # The KL term

    @property
    def kl_weight(self) -> float:
        """Of the current epoch's updates."""
        return self._objective.kl_weight * self._kl.value

    def steer_kl(self, epoch: int, drift: float) -> None:
        """Moves the weight at the start of an epoch's training, where a `kl_target` is set.

            factor = 2 * factor      if drift > 1.5 * kl_target
                     factor / 2      if drift < kl_target / 1.5
                     factor          otherwise

        The weight is the setting's times the factor, which stays between 1/8 and 64: a drift begins at 0, and the
        weight is to be there when it comes.

        Args:
            epoch: the current one.
            drift: `train/drift`, of all devices.

        Source: Schulman et al. 2017 (arXiv 1707.06347), section 4.
        """
        target, factor = self._objective.kl_target, self._kl.before(epoch)
        if target is not None:
            step = 2.0 if drift > 1.5 * target else 0.5 if drift < target / 1.5 else 1.0
            self._kl.steer(epoch, min(max(factor * step, KL_FACTORS[0]), KL_FACTORS[1]))

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Of each number that is adapted, by its name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; what it lacks begins anew."""
        for name, part in self._parts.items():
            if name in state:
                part.load_state_dict(state[name])
