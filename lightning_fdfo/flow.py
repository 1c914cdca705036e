"""FlowModel: what a base model must offer to be post-trained, and the conditioning that it is given.

An adapter for a model family is one file in `lightning_fdfo/flows/` that subclasses FlowModel. It stores names in
`__init__` and loads weights in `load()`. Its `transformer` is the only nn.Module that it registers: text encoders and
VAE stay in a plain holder, out of state_dict, DDP and sharding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.randomness import Stream, generator


@dataclass(frozen=True)
class Conditioning:
    """What the velocity is conditioned on: named tensors whose first axis is the batch.

    Example:
        >>> c = Conditioning({"embeds": torch.arange(3.0)})
        >>> c[[2, 2]].tensors["embeds"]
        tensor([2., 2.])
        >>> len(Conditioning.cat([c, c]))
        6
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Sequence[int] | Tensor) -> Conditioning:
        index = torch.as_tensor(rows, dtype=torch.long)
        return Conditioning({name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on another device."""
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins batches."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the transformer's linear layers: W + alpha / rank * B A.

    Args:
        rank: inner size of A and B.
        alpha: scale; the update is multiplied by alpha / rank.
        targets: names (or ends of names) of linear layers; None takes the adapter's own, the attention projections.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None


class FlowModel(nn.Module, ABC):
    """A text-to-image flow model. Time is `sigma` in [0, 1]; the velocity is d x / d sigma = noise - x0."""

    transformer: nn.Module
    """Set by `load()`; the only registered module."""
    lora_targets: tuple[str, ...]
    """Linear layers that LoRA binds by default."""

    @abstractmethod
    def check(self) -> None:
        """Raises ConfigurationError if `load()` cannot work, as far as can be known without loading."""

    @abstractmethod
    def load(self) -> None:
        """Loads weights, frozen and in eval mode; a second call does nothing."""

    @abstractmethod
    def to_device(self, device: torch.device) -> None:
        """Moves what is not registered (text encoders, VAE) to `device`."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> Conditioning:
        """Prompts to conditioning, a row each; negative prompts are needed for guidance only."""

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

    @abstractmethod
    def save_lora(self, folder: Path) -> None:
        """Writes `pytorch_lora_weights.safetensors`, which diffusers loads, into `folder`."""

    def add_lora(self, lora: LoRA, seed: int) -> list[str]:
        """Adds a LoRA to the loaded transformer and makes it the only thing that trains, in float32.

        Args:
            lora: its settings.
            seed: its initial weights are a function of this.

        Returns:
            Names of the modules that it bound.

        Raises:
            ConfigurationError: a target matches no linear layer.
        """
        targets = lora.targets or self.lora_targets
        linear = [name for name, module in self.transformer.named_modules() if isinstance(module, nn.Linear)]
        bound = [name for name in linear if any(name == t or name.endswith("." + t) for t in targets)]
        for target in targets:
            if not any(name == target or name.endswith("." + target) for name in linear):
                endings = sorted({".".join(name.split(".")[-2:]) for name in linear if name not in bound})
                raise ConfigurationError(
                    f"LoRA target {target!r} matches no linear layer of {type(self.transformer).__name__}; "
                    f"layers not bound so far end in: {', '.join(endings)}"
                )
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(targets),
            init_lora_weights="gaussian",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(Stream.ADAPTER, seed).initial_seed())
            self.transformer.add_adapter(config)  # type: ignore[operator]
        for parameter in self.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return bound
