"""Conditioning: what a velocity is conditioned on, a row a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
