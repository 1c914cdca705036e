"""RunRecord: the resolved configuration in the run's folder, and what is checked before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.checkpoints.last_checkpoint import find_last
from lightning_fdfo.checkpoints.resumed_settings import check_optimizer
from lightning_fdfo.checkpoints.run_folder import is_inside, run_folder
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.training.trained_state import check_complete

RECORD = "config.yaml"
"""The resolved configuration, in the run's folder."""


class RunRecord(SaveConfigCallback):
    """Writes the resolved configuration into the run's folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ConfigurationError for a checkpoint that is not there, or from which no run can resume."""
        record = Path(trainer.default_root_dir) / self.config_filename
        ckpt_path = self.config.get("ckpt_path")
        if self.config.get("weights_only") is False:
            raise ConfigurationError("--weights_only: expected true: a checkpoint's own code is never run")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                _check_checkpoints(callback)
        file = find_last(record.parent) if ckpt_path == "last" else ckpt_path
        if file:
            checkpoint = _read(trainer, Path(file))
            if stage == "fit" and checkpoint is not None:
                check_complete(checkpoint, file)
                check_optimizer(pl_module, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the record once all has been set up: a run that cannot start leaves no config.yaml."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes config.yaml; on a resume config-1.yaml and so on, beside it."""
        path, number = run_folder(trainer) / self.config_filename, 0
        while path.exists():
            number += 1
            path = path.with_name(f"{Path(self.config_filename).stem}-{number}.yaml")
        self.parser.save(self.config, path, skip_none=False)


def _check_checkpoints(callback: ModelCheckpoint) -> None:
    """Raises ConfigurationError for names that leave the folder, and where `last` could be lost."""
    if callback.filename is not None and not is_inside(callback.filename):
        raise ConfigurationError(
            f"ModelCheckpoint: expected a filename below dirpath, got {callback.filename}; set dirpath instead"
        )
    if callback.save_last == "link":
        raise ConfigurationError(
            "ModelCheckpoint: expected save_last: true, got link: a run that is killed can leave it leading nowhere"
        )


def _read(trainer: Trainer, file: Path) -> dict[str, Any] | None:
    """A checkpoint without its tensors' values; None if another plugin than ours reads checkpoints.

    Raises:
        ConfigurationError: it cannot be read: before a model is loaded, and for every strategy.
    """
    reader = trainer.strategy.checkpoint_io
    return reader.load_checkpoint(file, map_location="meta") if isinstance(reader, SafeCheckpointIO) else None
