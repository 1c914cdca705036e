"""Checkpoints on disk: written under a temporary name, synced, then renamed; read without running pickled code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH


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
