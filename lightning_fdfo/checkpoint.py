"""Checkpoints: only what trains, strict on load; on disk whole or not there, and read without running pickled code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own format and calls, on a local disk; a file is whole or not there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> io = AtomicCheckpointIO()
        >>> with TemporaryDirectory() as folder:
        ...     io.save_checkpoint({"epoch": 3}, f"{folder}/a.ckpt")
        ...     print(os.listdir(folder), io.load_checkpoint(f"{folder}/a.ckpt"))
        ['a.ckpt'] {'epoch': 3}
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Writes `path`; a killed process leaves the old file, or none."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.partial")
        super().save_checkpoint(checkpoint, temporary, storage_options)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)

    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads `path` with `weights_only=True`, whatever is asked for."""
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only=True)


def check_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compares settings without which a checkpoint's weights mean something else.

    Raises:
        ConfigurationError: one differs; the message names it with both values.

    Example:
        >>> check_settings({"seed": 0, "lora.alpha": 4.0}, {"seed": 0})
    """
    for name, value in own.items():
        if saved.get(name) != value:
            raise ConfigurationError(
                f"the checkpoint was written with {name}={saved.get(name)}, the configuration says {value}: "
                "use the configuration that it was written with"
            )


def check_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Compares names and shapes of a checkpoint's weights with those that train here.

    The frozen weights are not in a checkpoint, so that Lightning's own strict loading would not do.

    Raises:
        ConfigurationError: they are not the same.

    Example:
        >>> import torch
        >>> check_weights({"B": torch.zeros(2)}, {"B": torch.ones(2)})
    """
    expected = {name: value.shape for name, value in own.items()}
    missing = {name for name, shape in expected.items() if name not in saved or saved[name].shape != shape}
    differing = sorted(missing | (set(saved) - set(expected)))
    if differing:
        raise ConfigurationError(
            f"the checkpoint is of another model or LoRA: {len(differing)} weights differ in name or shape, "
            f"first {differing[0]}; use the configuration that it was written with"
        )
