"""SeededDropout: a LoRA's dropout, drawn from (seed, epoch, batch, device)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lightning_fdfo.randomness import Stream, generator


class SeededDropout:
    """Dropout that is on within a training batch alone, and leaves the global generators as they were.

    The transformer stays in eval mode, so that rollout and training see the same velocities.

    Args:
        layers: the LoRA's dropout layers; with none of them nothing happens.
        seed: the run's.

    Example:
        >>> layer = nn.Dropout(0.5).eval()
        >>> dropout, ones = SeededDropout([layer], seed=0), torch.ones(8)
        >>> dropout.switch(True)
        >>> with dropout.seeded(epoch=0, index=0, device=torch.device("cpu")):
        ...     first = layer(ones)
        >>> with dropout.seeded(epoch=0, index=0, device=torch.device("cpu")):
        ...     print(torch.equal(layer(ones), first))
        True
    """

    def __init__(self, layers: Sequence[nn.Module], seed: int) -> None:
        self._layers = layers
        self._seed = seed

    def switch(self, on: bool) -> None:
        """On from a batch's start to its end, for checkpointed blocks run again in the backward pass."""
        for layer in self._layers:
            layer.train(on)

    @contextmanager
    def seeded(self, epoch: int, index: int, device: torch.device) -> Iterator[None]:
        """While it is open, draws are a function of the seed and these.

        Args:
            epoch: the current one.
            index: of the batch, counted over all devices.
            device: where the layers are.
        """
        if not self._layers:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(generator(Stream.DROPOUT, self._seed, epoch, index).initial_seed())
            yield
