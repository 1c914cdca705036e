"""FlowModel: what a base model must offer to be post-trained, and the conditioning that it is given.

It stores names in `__init__` and loads weights in `load()`. Its `transformer` is the only nn.Module that it registers:
text encoders and VAE stay in a plain holder, out of state_dict, DDP and sharding. A model that diffusers has a pipeline
for takes most of it from `lightning_fdfo/flows/diffusers_flow.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.lora import LoRA, bind_lora
from lightning_fdfo.flows.lora_contents import check_layers, fill_lora, lora_in_file

Guidance = Literal["classifier-free", "embedded", "none"]
"""By a second forward with the negative prompt, as an input that the model was distilled on, or not at all."""


@dataclass(frozen=True)
class Conditioning:
    """What the velocity is conditioned on: named tensors whose first axis is the batch.

    Texts of different lengths are padded with zeros along the second axis where batches are joined; a model that must
    tell them from text carries a mask among the tensors.

    Example:
        >>> c = Conditioning({"embeds": torch.arange(3.0)})
        >>> c[[2, 2]].tensors["embeds"]
        tensor([2., 2.])
        >>> len(Conditioning.cat([c, c]))
        6
        >>> Conditioning.cat([Conditioning({"mask": torch.ones(1, n)}) for n in (1, 2)]).tensors["mask"]
        tensor([[1., 0.],
                [1., 1.]])
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
        return Conditioning({name: _cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Joined along the first axis, padded to the longest along the second."""
    if tensors[0].ndim < 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    padding = [0, 0] * (tensors[0].ndim - 2)
    return torch.cat([F.pad(tensor, [*padding, 0, longest - tensor.shape[1]]) for tensor in tensors])


class FlowModel(nn.Module, ABC):
    """A text-to-image flow model. Time is `sigma` in [0, 1]; the velocity is d x / d sigma = noise - x0."""

    transformer: nn.Module
    """Set by `load()`; the only registered module."""
    lora_targets: tuple[str, ...]
    """Linear layers that LoRA binds by default."""

    @property
    def guidance(self) -> Guidance:
        """How `guidance_scale` is used; known once the model is loaded."""
        return "classifier-free"

    @property
    def blocks(self) -> list[nn.Module]:
        """The loaded transformer's repeated blocks, in order: what sharding wraps one by one."""
        return []

    @abstractmethod
    def check(self) -> None:
        """Raises ConfigurationError if `load()` cannot work, as far as can be known without loading."""

    def outline(self) -> nn.Module | None:
        """The transformer without its weights, on the meta device, where it can be had before `load`.

        If there is one, `latent_shape` works before `load`, too: what cannot fit is refused before anything is loaded.

        Raises:
            ConfigurationError: its description cannot be had.
        """
        return None

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
        """Writes `pytorch_lora_weights.safetensors`, which diffusers loads, into `folder`.

        The file must act the same where its metadata is not read: see `lora_folding.folded`. Each process must call it,
        for weights may be sharded; the first one writes.
        """

    def encoding(self) -> AbstractContextManager[None]:
        """While it is open, `encode` finds the text encoders on the device."""
        return nullcontext()

    def cache_texts(self, prompts: Sequence[str], negative_prompts: Sequence[str], device: torch.device) -> None:
        """Called before `load` with texts that the run will encode; a model may encode them now, once for all."""

    def read_lora(self, file: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """The weights of a diffusers LoRA file, as `transformer.LAYER.lora_A.weight` and so on, and its metadata."""
        raise ConfigurationError(f"LoRA {file}: {type(self).__name__} cannot read LoRA files")

    def check_lora(self, file: Path) -> None:
        """Raises ConfigurationError unless a file holds a complete LoRA; the model need not be loaded."""
        lora_in_file(*self.read_lora(file), file)

    def load_lora(self, file: Path) -> None:
        """Copies a file's weights into the LoRA that `add_lora` has made, scaled so that they do what they did.

        Raises:
            ConfigurationError: they do not fit it.
        """
        fill_lora(self.transformer, *self.read_lora(file), file)

    def adopt_lora(self, file: Path) -> LoRA:
        """Adds the LoRA that a file holds, of whatever rank and on whatever layers.

        Returns:
            Its settings.

        Raises:
            ConfigurationError: the file holds no LoRA of this transformer's, or not all of one.
        """
        state, metadata = self.read_lora(file)
        lora = lora_in_file(state, metadata, file)
        check_layers(self.transformer, state, metadata, file)
        bind_lora(self.transformer, lora, lora.targets or (), seed=0)
        fill_lora(self.transformer, state, metadata, file)
        return lora

    def add_lora(self, lora: LoRA, seed: int) -> list[str]:
        """Adds a LoRA to the loaded transformer and makes it the only thing that trains, in float32.

        Args:
            lora: its settings.
            seed: its initial weights are a function of this.

        Returns:
            Names of the modules that it bound.

        Raises:
            ConfigurationError: a target matches no linear layer, or `init_lora` does not fit.
        """
        bound = bind_lora(self.transformer, lora, lora.targets or self.lora_targets, seed)
        if lora.init_lora is not None:
            self.load_lora(Path(lora.init_lora))
        return bound

    def train_all(self) -> None:
        """Makes the whole loaded transformer trainable, in float32."""
        self.transformer.float().requires_grad_(True)
