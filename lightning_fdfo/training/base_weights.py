"""Puts the base model's weights in place of the tuned ones, for a while; and knows its velocity at a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_fdfo.parallel import reshard


class BaseWeights:
    """Knows the base's weights, and puts them in place.

    With a LoRA it switches that off. Where the whole transformer trains it keeps a copy of what it was on the CPU, so
    that it must be made before a checkpoint is loaded.

    Args:
        transformer: the base, loaded; with its LoRA bound if there is one.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> base, before = BaseWeights(layer), layer.weight.item()
        >>> _ = layer.weight.data.fill_(7.0)
        >>> with base.in_place():
        ...     print(layer.weight.item() == before)
        True
        >>> layer.weight.item()
        7.0
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer: Any = transformer
        self._copies: list[Tensor] = []
        self._known: tuple[Tensor, Tensor] | None = None
        if not has_lora(transformer):
            self._copies = [_local(parameter).to("cpu", copy=True) for parameter in transformer.parameters()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it is open, the transformer is the base."""
        if not self._copies:
            self._transformer.disable_adapters()
            try:
                yield
            finally:
                self._transformer.enable_adapters()
            return
        reshard(self._transformer)
        own = [_local(parameter).clone() for parameter in self._transformer.parameters()]
        self._put(self._copies)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def velocity(self, latents: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The base's velocity at a batch's latents; for the batch that was asked for last it is there already.

        Args:
            latents: [B, ...], which are not written to.
            compute: gives the transformer's velocity there, [B, ...].

        Example:
            >>> layer, latents = nn.Linear(1, 1), torch.ones(1, 1)
            >>> base = BaseWeights(layer)
            >>> base.velocity(latents, lambda: layer(latents)) is base.velocity(latents, lambda: layer(latents))
            True
        """
        if self._known is None or self._known[0] is not latents:
            with self.in_place():
                self._known = latents, compute()
        return self._known[1]

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        reshard(self._transformer)
        for parameter, value in zip(self._transformer.parameters(), values, strict=True):
            _local(parameter).copy_(value)


def has_lora(transformer: nn.Module) -> bool:
    """Whether a LoRA is bound."""
    return bool(getattr(transformer, "peft_config", None))


def _local(parameter: Tensor) -> Tensor:
    """A parameter's own part on this device, without its history."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
