"""FlowModel: what a base model must offer to be post-trained.

A subclass writes eight members, which are abstract: `validate`, `load`, `to_device`, `encode`, `latent_shape`,
`sigmas`, `velocity` and `decode`. The rest has defaults. `blocks` is an empty list by default: override it to shard.
LoRA, its files, sampling and the objective need nothing more.

The order of calls: `prepare_texts` before `load`; after it, `with encoding(): encode(...)`.

A model that diffusers has a pipeline for takes most of it from `lightning_fdfo/flows/diffusers_flow.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.quantization import Quantization

Guidance = Literal["classifier-free", "embedded", "none"]
"""By a second forward with the negative prompt, as an input that the model was distilled on, or not at all."""


class FlowModel(nn.Module, ABC):
    """A text-to-image flow model. Time is `sigma` in [0, 1]; the velocity is d x / d sigma = noise - x0.

    `__init__` stores names, and `load()` loads weights. The `transformer` is the only nn.Module that a flow registers:
    text encoders and VAE stay in plain attributes of a class that is no nn.Module, out of state_dict, DDP and sharding.

    Example:
        A velocity of one linear layer, on images of 2 x 2 pixels:

        >>> class Linear(FlowModel):
        ...     def validate(self): ...
        ...     def load(self):
        ...         self.transformer = nn.Linear(12, 12).requires_grad_(False)
        ...     def to_device(self, device): ...
        ...     def encode(self, prompts, negative_prompts=None):
        ...         return Conditioning({"length": torch.tensor([[len(prompt)] for prompt in prompts])})
        ...     def latent_shape(self, height, width):
        ...         return (3, height, width)
        ...     def sigmas(self, num_steps, height, width):
        ...         return torch.linspace(1, 0, num_steps + 1)
        ...     def velocity(self, latents, sigma, conditioning, guidance_scale=1.0):
        ...         return self.transformer(latents.flatten(1)).view_as(latents)
        ...     def decode(self, latents):
        ...         return latents.sigmoid()
        >>> flow = Linear()
        >>> flow.load()
        >>> latents = torch.zeros(1, *flow.latent_shape(2, 2))
        >>> flow.velocity(latents, torch.tensor(1.0), flow.encode(["a cat"])).shape
        torch.Size([1, 3, 2, 2])
        >>> flow.uses_negatives(guidance_scale=3.0), flow.uses_negatives(guidance_scale=1.0)
        (True, False)
    """

    transformer: nn.Module
    """Set by `load()`; the only registered module. A LoRA needs diffusers' `PeftAdapterMixin` among its bases."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that LoRA binds by default: names, or ends of names."""
    quantization: Quantization | None = None
    """How the frozen weights are quantised, if they are: then a LoRA can train, and the transformer cannot."""

    # What a model must say

    @abstractmethod
    def validate(self) -> None:
        """Raises ConfigurationError if `load()` cannot work, as far as can be known without loading."""

    @abstractmethod
    def load(self) -> None:
        """Loads weights, frozen and in eval mode; a second call does nothing."""

    @abstractmethod
    def to_device(self, device: torch.device) -> None:
        """Moves what is not registered (text encoders, VAE) to `device`."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> Conditioning:
        """Prompts to conditioning, a row each; negative prompts are given if `uses_negatives`."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one latent for an image of height x width pixels.

        Raises:
            ConfigurationError: the size does not fit the model's patches.
        """

    @abstractmethod
    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """The model's own grid, float32 [num_steps + 1], from 1 to 0."""

    @abstractmethod
    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The (guided) velocity.

        Args:
            latents: [N, ...].
            sigma: 0-d or [N], in (0, 1].
            conditioning: N rows.
            guidance_scale: 1 is without guidance; else v_negative + guidance_scale * (v - v_negative).

        Returns:
            [N, ...].
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images, float32 [N, 3, H, W] in [0, 1]."""

    @property
    def blocks(self) -> list[nn.Module]:
        """The loaded transformer's repeated blocks, in order: sharding wraps each. Empty by default."""
        return []

    # What has a default

    @property
    def guidance(self) -> Guidance:
        """How `guidance_scale` is used; known once there is an outline, or the model is loaded."""
        return "classifier-free"

    def uses_negatives(self, guidance_scale: float) -> bool:
        """Whether guidance at this scale takes negative prompts: no other place decides this."""
        return guidance_scale != 1.0 and self.guidance == "classifier-free"

    def outline(self) -> nn.Module | None:
        """The transformer without its weights, on the meta device, where it can be had before `load`.

        If there is one, `latent_shape` and `guidance` work before `load` too, and sizes that cannot fit are refused
        before anything is loaded.

        Raises:
            ConfigurationError: its description cannot be had.
        """
        return None

    def encoding(self) -> AbstractContextManager[None]:
        """While it is open, `encode` finds the text encoders on the device."""
        return nullcontext()

    def prepare_texts(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] = lambda: None,
    ) -> None:
        """Called before `load` with all texts that the run will encode; a model may encode them now, once for all.

        Args:
            prompts: of all devices.
            negative_prompts: of all devices; empty unless `uses_negatives`.
            device: to encode on.
            rank: of this process, which may encode a share.
            world_size: number of processes.
            barrier: waits until every process has called it.
        """

    @property
    def lora_reader(self) -> Callable[..., Any] | None:
        """Diffusers' `lora_state_dict` of this model's pipeline, which converts other trainers' LoRA files.

        Without one, a file must hold `transformer.LAYER.lora_A.weight` and so on.
        """
        return None

    def compile_transformer(self) -> None:
        """Called once, when what trains is decided and before weights are sharded; a model may compile now.

        Names of weights must stay: nn.Module's `compile`, which works in place. Nothing by default.
        """

    def train_all(self) -> None:
        """Makes the whole loaded transformer trainable, in float32.

        Raises:
            ConfigurationError: its weights are quantised.
        """
        self.check_trains_all()
        self.transformer.float().requires_grad_(True)

    def check_trains_all(self) -> None:
        """Raises ConfigurationError if the transformer can train by a LoRA only; it need not be loaded."""
        if self.quantization is not None:
            raise ConfigurationError("flow.quantization: quantised weights cannot train; use a LoRA")
