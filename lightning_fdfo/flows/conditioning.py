"""Conditioning: what a velocity is conditioned on, one row per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEGATIVE = "negative_"
"""How the names of negative prompts' tensors begin."""


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
        """The same on another device; what is pinned is copied to a GPU without waiting."""
        ahead = torch.device(device).type == "cuda"
        return Conditioning({name: tensor.to(device, non_blocking=ahead) for name, tensor in self.tensors.items()})

    def pin_memory(self) -> Conditioning:
        """The same in pinned memory, from which a GPU copies without making the program wait."""
        return Conditioning({name: tensor.pin_memory() for name, tensor in self.tensors.items()})

    def with_negatives(self, negatives: Mapping[str, Tensor]) -> Conditioning:
        """The same, and beside it the tensors of negative prompts, which are named `negative_…`."""
        return Conditioning({**self.tensors, **{f"{NEGATIVE}{name}": tensor for name, tensor in negatives.items()}})

    def split_negatives(self) -> tuple[Conditioning, Conditioning]:
        """The conditioning of prompts, and that of negative prompts under the same names; it may have no tensors.

        Example:
            >>> both = Conditioning({"embeds": torch.zeros(2)}).with_negatives({"embeds": torch.ones(2)})
            >>> both.split_negatives()[1].tensors
            {'embeds': tensor([1., 1.])}
        """
        positive = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(NEGATIVE)}
        names = [name for name in positive if f"{NEGATIVE}{name}" in self.tensors]
        return Conditioning(positive), Conditioning({name: self.tensors[f"{NEGATIVE}{name}"] for name in names})

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
