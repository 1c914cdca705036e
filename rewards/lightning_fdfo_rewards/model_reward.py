"""What all rewards that a neural network computes have in common: options, loading once, batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.reward import BaseReward, Metadata, PairReward, Reward

DType = Literal["float32", "bfloat16"]


class LoadedModel(BaseReward):
    """What a frozen model needs to be a reward of either kind.

    Args:
        dtype: of the weights. bfloat16 halves the memory; the small differences of a pair want float32.
        batch_size: images per forward, or pairs; sets memory only.
        device: where it runs; None: beside the flow.

    Raises:
        ConfigurationError: another dtype, a batch_size below 1.
    """

    def __init__(self, dtype: DType = "float32", batch_size: int = 16, device: str | None = None) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ConfigurationError(f"{self.name}: expected dtype float32 or bfloat16, got {dtype!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigurationError(f"{self.name}: expected batch_size >= 1, got {batch_size!r}")
        self.dtype = dtype
        self.batch_size = batch_size
        self.device = device

    @abstractmethod
    def load(self, device: torch.device) -> Any:
        """What scoring needs, on `device`; the weights come from a function that is `cached_weak`."""

    @property
    def model(self) -> Any:
        """What `load` gave.

        Raises:
            RewardError: before `setup`.
        """
        loaded = vars(self).get("_loaded")
        if loaded is None:
            raise RewardError(f"{self.name}: call setup(device) before the first score")
        return loaded[1]

    def setup(self, device: torch.device) -> None:
        """Loads the model onto `device`; a second call with the same device does nothing."""
        loaded = vars(self).get("_loaded")
        if loaded is None or loaded[0] != device:
            self._loaded = (device, self.load(device))

    def _slices(self, count: int) -> list[slice]:
        """The chunks of a batch."""
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]


class ModelReward(LoadedModel, Reward):
    """A reward that a frozen model computes; see `LoadedModel` for its options."""

    differentiable = True

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores one batch, [N]; `self.model` is what `load` gave."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores a batch in chunks of `batch_size`; see `Reward.__call__`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            chunks = [self.score(images[rows], prompts[rows]) for rows in self._slices(len(images))]
            return torch.cat(chunks).float() if chunks else torch.zeros(0)


class ModelPairReward(LoadedModel, PairReward):
    """A reward that a frozen model computes from two images; see `LoadedModel` for its options."""

    @abstractmethod
    def prefer(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compares one batch, [P]; `self.model` is what `load` gave."""

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Compares a batch in chunks of `batch_size`; see `PairReward.__call__`."""
        chunks = [self.prefer(first[rows], second[rows], prompts[rows]) for rows in self._slices(len(first))]
        return torch.cat(chunks).float() if chunks else torch.zeros(0)


def from_tensors(
    cls: Any,
    config: Any,
    tensors: Mapping[str, Tensor],
    dtype: str,
    device: torch.device,
    source: object,
    **options: Any,
) -> nn.Module:
    """A transformers model from tensors under its own names; every weight must be there, and nothing else.

    Args:
        cls: the model's class.
        config: its configuration.
        tensors: name -> tensor.
        dtype: of the weights.
        device: where to put it.
        source: where the tensors come from, for the message.
        options: of the class's constructor.

    Raises:
        ConfigurationError: names or shapes do not fit.
    """
    try:
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **options,
        )
    except RuntimeError as error:  # a wrong shape
        raise ConfigurationError(f"{source} does not hold the weights of {cls.__name__}: {error}") from error
    differing = [*info["missing_keys"], *info["unexpected_keys"], *(str(key) for key in info["mismatched_keys"])]
    if differing:
        raise ConfigurationError(
            f"{source} does not hold the weights of {cls.__name__}: {len(differing)} differ, first {differing[0]!r}"
        )
    return frozen(model, device)


def frozen(model: Any, device: torch.device) -> nn.Module:
    """The model for scoring: on `device`, in eval mode, without gradients."""
    return model.eval().requires_grad_(False).to(device)  # type: ignore[no-any-return]


class LinearHead(nn.Sequential):
    """Linear layers one after the other, with nothing between: the head of Aesthetic and of ImageReward.

    Args:
        tensors: `layers.K.weight` and `layers.K.bias`, K ascending; the numbers that are left out were dropout.

    Example:
        >>> tensors = {"layers.0.weight": torch.ones(2, 3), "layers.0.bias": torch.zeros(2),
        ...            "layers.2.weight": torch.ones(1, 2), "layers.2.bias": torch.ones(1)}
        >>> LinearHead(tensors)(torch.ones(1, 3))
        tensor([[7.]])
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        numbers = sorted({int(name.split(".")[1]) for name in tensors})
        layers = []
        for number in numbers:
            weight, bias = tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer.requires_grad_(False))
        super().__init__(*layers)
