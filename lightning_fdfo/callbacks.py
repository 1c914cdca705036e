"""Callbacks that write into the run's folder: pictures before and after, the reward's curve, the LoRA as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_fdfo.ema import EMA
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.module import FDFOModule
from lightning_fdfo.parallel import is_first_process


def image_grid(images: Tensor, columns: int, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Images side by side, in rows.

    Args:
        images: [N, 3, H, W] in [0, 1].
        columns: images a row.
        zoom: pixels a pixel, >= 1.
        gap: pixels of grey between images.

    Example:
        >>> image_grid(torch.ones(3, 3, 8, 16), columns=2).size
        (38, 22)
    """
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = Image.new(
        "RGB",
        ((columns * (width * zoom + gap) + gap), rows * (height * zoom + gap) + gap),
        (128, 128, 128),
    )
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, pixel in enumerate(pixels):
        row, column = divmod(index, columns)
        tile = Image.fromarray(pixel).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + column * (width * zoom + gap), gap + row * (height * zoom + gap)))
    return sheet


class BeforeAfter(Callback):
    """Judges the fixed validation prompts before and after training.

    The validation before any step (Lightning's sanity check; set `num_sanity_val_steps: -1`) and the last one of `fit`
    are compared: grids of their first images go to `before.png` and `after.png`, all mean scores to
    `before_after.json`, and a table is printed.

    Args:
        num_images: in a grid.
        columns: of the grid.
        zoom: pixels a pixel.
    """

    def __init__(self, num_images: int = 24, columns: int = 6, zoom: int = 2) -> None:
        self.num_images = num_images
        self.columns = columns
        self.zoom = zoom
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.after_epoch = 0
        self._images: list[Tensor] = []
        self._sums: dict[str, tuple[float, int]] = {}
        """Sum and number of each name's scores; an image that a reward failed on has none."""

    def state_dict(self) -> dict[str, Any]:
        """The first validation's scores, so that a resumed run still compares with the base model."""
        return {"before": self.before, "after": self.after, "after_epoch": self.after_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them."""
        self.before, self.after = state_dict["before"], state_dict["after"]
        self.after_epoch = state_dict["after_epoch"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ConfigurationError if the base model would be judged on a part of the prompts only."""
        if stage == "fit" and trainer.num_sanity_val_steps not in (0, float("inf")):
            raise ConfigurationError(
                f"BeforeAfter: expected trainer.num_sanity_val_steps -1 (or 0, for no comparison), "
                f"got {trainer.num_sanity_val_steps}"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
        self._images, self._sums = [], {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Adds a batch's scores, and its images until the grid is full."""
        if sum(len(images) for images in self._images) < self.num_images:
            self._images.append(outputs["images"])
        for name, scores in outputs["scores"].items():
            value, count = self._sums.get(name, (0.0, 0))
            scored = scores[scores.isfinite()].double()
            self._sums[name] = (value + scored.sum().item(), count + len(scored))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the grid; the sanity check's is `before`, each later one `after`."""
        if not _judges_a_fit(trainer):
            return
        names = list(self._sums)
        local = torch.tensor([self._sums[name] for name in names], dtype=torch.float64, device=pl_module.device)
        sums = trainer.strategy.reduce(local, reduce_op="sum").tolist()
        means = {name: value / max(count, 1) for name, (value, count) in zip(names, sums, strict=True)}
        if trainer.sanity_checking:
            self.before = means
        else:
            self.after, self.after_epoch = means, trainer.current_epoch + 1
        if trainer.is_global_zero:
            images = torch.cat(self._images)[: self.num_images]
            path = run_folder(trainer) / ("before.png" if trainer.sanity_checking else "after.png")
            image_grid(images, self.columns, self.zoom).save(path)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table and writes `before_after.json`."""
        if not (self.before and self.after):
            return
        table = Table("", "before", f"after epoch {self.after_epoch}", "change", title="Fixed validation prompts")
        for name, before in self.before.items():
            after = self.after[name]
            table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
        Console().print(table)
        summary = {"before": self.before, "after": self.after, "after_epoch": self.after_epoch}
        folder = run_folder(trainer)
        (folder / "before_after.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(f"Pictures, curve and LoRA are in {folder}")


class RewardCurve(Callback):
    """Draws the mean reward of each epoch's rollouts, and of each validation, to `reward_curve.png` at the end."""

    def __init__(self) -> None:
        self.rollouts: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """The curve so far."""
        return {"rollouts": self.rollouts, "validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the curve up where it stopped."""
        self.rollouts, self.validations = state_dict["rollouts"], state_dict["validations"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes a validation's mean reward."""
        if not _judges_a_fit(trainer) or "val/reward" not in trainer.callback_metrics:
            return
        epoch = 0 if trainer.sanity_checking else trainer.current_epoch + 1
        self.validations.append((epoch, trainer.callback_metrics["val/reward"].item()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes an epoch's mean reward."""
        self.rollouts.append((trainer.current_epoch + 1, trainer.callback_metrics["reward/mean"].item()))

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws."""
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        for points, style, label in (
            (self.rollouts, "-", "rollouts"),
            (self.validations, "o-", "validation, no churn"),
        ):
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(xlabel="epoch", ylabel="mean reward")
        axes.grid(alpha=0.3)
        if self.rollouts or self.validations:
            axes.legend()
        figure.savefig(run_folder(trainer) / "reward_curve.png", dpi=120)


class LoRAExport(Callback):
    """Writes the LoRA as `pytorch_lora_weights.safetensors`, which diffusers loads, at the end of `fit`.

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
    """The first process writes; all take part, for weights may be sharded."""
    partial = folder / ".partial"
    if is_first_process():
        partial.mkdir(parents=True, exist_ok=True)
    pl_module.flow.save_lora(partial)  # type: ignore[union-attr,operator]
    if is_first_process():
        for file in partial.iterdir():
            file.replace(folder / file.name)
        partial.rmdir()


def _judges_a_fit(trainer: Trainer) -> bool:
    """Whether a validation belongs to `fit`, and is not the sanity check of a resumed one."""
    return trainer.state.fn == TrainerFn.FITTING and not (trainer.sanity_checking and trainer.global_step)


def run_folder(trainer: Trainer) -> Path:
    """Where a run's files go: `default_root_dir`, made if need be."""
    folder = Path(trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_inside(path: str) -> bool:
    """Whether a path leads to something below the folder that it is joined to.

    Example:
        >>> is_inside("lora/final"), is_inside("../lora"), is_inside("/tmp/lora"), is_inside(".")
        (True, False, False, False)
    """
    return bool(Path(path).parts) and not Path(path).is_absolute() and ".." not in Path(path).parts
