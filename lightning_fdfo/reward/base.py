"""The contracts of rewards: a class that scores images, and one that says which of two images is better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import HubFiles

Metadata = Mapping[str, Any]
Scorer = Callable[..., Tensor]
"""A plain function as a reward: `(images, prompts, metadata, **options) -> [N]`."""


class BaseReward:
    """What `Reward` and `PairReward` share. Not an nn.Module: it stays out of state_dict, DDP and sharding.

    `__init__` stores options, as public attributes, and imports nothing heavy. `setup` loads what they name, once, into
    attributes that start with an underscore. So a reward pickles by its configuration: underscored attributes are left
    out, and the copy is set up again where it arrives. `lightning_fdfo.testing.check_reward` checks all of it.
    """

    range: tuple[float, float] = (float("-inf"), float("inf"))
    """Lowest and highest number that can come, with the options' defaults; an instance may have its own."""
    higher_is_better: bool = True
    """False for a cost: a mixture then turns its sign, so that a positive weight always asks for better images."""
    required_metadata: tuple[str, ...] = ()
    """Keys that each prompt's metadata must have."""
    needs: str = ""
    """What it needs of a prompt, in words, where `required_metadata` does not say it all; empty: nothing."""
    hub_files: tuple[HubFiles, ...] = ()
    """What `setup` loads, with the options' defaults; an instance may have its own."""
    packaged_weights: str = ""
    """Weights that came with an installed package: which, and their licence, in words."""
    differentiable: bool = False
    """Whether its scores carry a gradient where the images do: a term of it may then say `gradient: true`."""
    device: str | None = None
    """Where it runs, if not beside the flow: "cpu" for a reward that has no use for a GPU."""

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Keeps the arguments: an error message names the command that makes and checks the same reward."""
        reward = super().__new__(cls)
        vars(reward)["_made_with"] = (arguments, options)
        return reward

    @property
    def name(self) -> str:
        """What messages call it: its class's name."""
        return type(self).__name__

    def fetch(self) -> None:
        """Fetches its weights into the cache; called on one process of each machine, before any model is loaded."""
        for files in self.hub_files:
            files.fetch()

    def setup(self, device: torch.device) -> None:
        """Loads weights onto `device`, once; called before the first score, perhaps more than once."""

    def start_epoch(self, epoch: int, pairs: Sequence[int], num_pairs: int, folder: Path) -> None:
        """Told before an epoch's first pair is scored; pairs come in their order.

        Args:
            epoch: from 0.
            pairs: this device's, by their index in the epoch.
            num_pairs: of all devices.
            folder: the run's.
        """

    def check(self, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError if this prompt cannot be scored; called for each prompt before any model loads."""
        missing = [key for key in self.required_metadata if key not in metadata]
        if missing:
            raise ConfigurationError(f"{self.name} needs metadata {missing}, got keys {sorted(metadata)}")

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of some prompts are longer than it reads; asked once, after `setup`, so that a run can warn."""
        return 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy: its public attributes only, without the arguments that the original was made with."""
        self.__dict__ = dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Its configuration: public attributes only."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class Reward(BaseReward, ABC):
    """Scores images.

    Example:
        >>> class Brightness(Reward):
        ...     range = (0.0, 1.0)
        ...     def __call__(self, images, prompts, metadata):
        ...         return images.mean(dim=(1, 2, 3))
        >>> Brightness()(torch.ones(2, 3, 8, 8), ["a", "b"], [{}, {}])
        tensor([1., 1.])
    """

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores a batch.

        It should leave its arguments as they are. A mixture hands each reward copies of its own, so that one that
        does not changes nothing for others.

        Args:
            images: [N, 3, H, W], float32 in [0, 1], on the device of `setup`.
            prompts: N strings.
            metadata: N mappings.

        Returns:
            [N], finite real numbers within float32's range, on the images' device or the CPU. float64 is kept until a
            pair's scores are subtracted; integers and bool (as 0 and 1) count as numbers, complex ones do not.
        """


class PairReward(BaseReward, ABC):
    """Says which of two images of a prompt is better, for judges that compare: a person, a model that sees both.

    In a mixture it is a term as any other: the half difference of a pair is half of its preference. In validation and
    `test` it compares an image with the base model's from the same latents, and its mean is a win rate.

    Example:
        >>> class Brighter(PairReward):
        ...     def __call__(self, first, second, prompts, metadata):
        ...         return (first.mean(dim=(1, 2, 3)) - second.mean(dim=(1, 2, 3))).sign()
        >>> Brighter()(torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), ["a cat"], [{}])
        tensor([1.])
    """

    range: tuple[float, float] = (-1.0, 1.0)
    validates: bool = True
    """Whether it also compares images in validation and `test`, with the base model's; False for a judge whose time is
    for training."""

    @abstractmethod
    def __call__(self, first: Tensor, second: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Compares a batch of pairs.

        It should leave its arguments as they are, as `Reward.__call__`.

        Args:
            first: [P, 3, H, W], float32 in [0, 1], on the device of `setup`.
            second: [P, 3, H, W], of the same prompts.
            prompts: P strings.
            metadata: P mappings.

        Returns:
            [P], in [-1, 1], on the images' device or the CPU: above 0 where the first image is better, 0 for a tie.
            With the images swapped it is to be the opposite. NaN says that a pair has not been compared: it is dropped,
            where `failures.on_reward_error` drops pairs, and an error elsewhere.
        """
