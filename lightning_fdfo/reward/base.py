"""The contract of a reward: a class that scores images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import HubFiles

Metadata = Mapping[str, Any]
Scorer = Callable[..., Tensor]
"""A plain function as a reward: `(images, prompts, metadata, **options) -> [N]`."""


class Reward(ABC):
    """Scores images. Not an nn.Module: it stays out of state_dict, DDP and sharding.

    `__init__` stores options, as public attributes, and imports nothing heavy. `setup` loads what they name, once, into
    attributes that start with an underscore. So a reward pickles by its configuration: underscored attributes are left
    out, and the copy is set up again where it arrives. `lightning_fdfo.testing.check_reward` checks all of it.

    Example:
        >>> class Brightness(Reward):
        ...     range = (0.0, 1.0)
        ...     def __call__(self, images, prompts, metadata):
        ...         return images.mean(dim=(1, 2, 3))
        >>> Brightness()(torch.ones(2, 3, 8, 8), ["a", "b"], [{}, {}])
        tensor([1., 1.])
    """

    range: tuple[float, float] = (float("-inf"), float("inf"))
    """Lowest and highest score that can come, with the options' defaults; an instance may have its own."""
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

    def setup(self, device: torch.device) -> None:  # noqa: B027 - a reward without weights has nothing to set up
        """Loads weights onto `device`, once; called before the first score, perhaps more than once."""

    def check(self, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError if this prompt cannot be scored; called for each prompt before any model loads."""
        missing = [key for key in self.required_metadata if key not in metadata]
        if missing:
            raise ConfigurationError(f"{self.name} needs metadata {missing}, got keys {sorted(metadata)}")

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of some prompts are longer than it reads; asked once, after `setup`, so that a run can warn."""
        return 0

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy: its public attributes only, without the arguments that the original was made with."""
        self.__dict__ = dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Its configuration: public attributes only."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}
