"""LoRAExport: the LoRA as a file that diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_fdfo.callbacks.ema import EMA
from lightning_fdfo.checkpoints.run_folder import is_inside, run_folder
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import atomic_path, is_first_process
from lightning_fdfo.finite import check_finite_weights
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.lora_files import save_lora
from lightning_fdfo.module import FDFOModule


class LoRAExport(Callback):
    """Writes the LoRA as `pytorch_lora_weights.safetensors`, which diffusers loads, at the end of `fit`.

    Its scale is folded into its weights (alpha = rank), so that it acts the same where metadata is not read.

    With an `EMA` among the callbacks, the averaged LoRA takes its place, and the LoRA as it was trained goes to a
    folder of that name and `_raw`: `lora/` and `lora_raw/`.

    Args:
        subfolder: of the run's folder.
    """

    def __init__(self, subfolder: str = "lora") -> None:
        self.subfolder = subfolder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ConfigurationError for a module without a LoRA, and a folder that is not the run's."""
        if not is_inside(self.subfolder):
            raise ConfigurationError(f"LoRAExport: expected a subfolder of the run's folder, got {self.subfolder!r}")
        if stage == "fit" and (not isinstance(pl_module, FDFOModule) or pl_module.lora is None):
            raise ConfigurationError("LoRAExport needs a module that trains a LoRA: leave it out for full fine-tuning")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes each file under a temporary name, then renames it."""
        folder = run_folder(trainer) / self.subfolder
        averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
        for ema in averages:
            _write_lora(pl_module, folder.with_name(f"{folder.name}_raw"))
            with ema.averaged(pl_module):
                _write_lora(pl_module, folder)
        if not averages:
            _write_lora(pl_module, folder)


def _write_lora(pl_module: LightningModule, folder: Path) -> None:
    """The first process writes; all take part, for weights may be sharded. What is not finite is not written."""
    check_finite_weights({name: value for name, value in pl_module.named_parameters() if value.requires_grad})
    partial = folder / ".partial"
    if is_first_process():
        partial.mkdir(parents=True, exist_ok=True)
    save_lora(cast(FlowModel, pl_module.flow), partial)
    if is_first_process():
        for file in partial.iterdir():
            with atomic_path(folder / file.name) as target:  # its mode follows the umask, safetensors' own does not
                file.replace(target)
        partial.rmdir()
