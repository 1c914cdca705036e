"""BeforeAfter: images and scores of the fixed validation prompts, before and after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_fdfo.callbacks.pictures import image_grid, save_image
from lightning_fdfo.checkpoints.run_folder import belongs_to_fit, run_folder
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import write_text
from lightning_fdfo.parallel import sum_over_processes


class BeforeAfter(Callback):
    """Evaluates the fixed validation prompts before and after training.

    The validation before any step (Lightning's sanity check; set `num_sanity_val_steps: -1`) and the last one of `fit`
    are compared: grids of their first images, each above its prompt, go to `before.png` and `after.png`, all mean
    scores to `before_after.json`, and a table is printed.

    Args:
        num_images: in a grid.
        columns: of the grid.
        zoom: pixels of the grid for each pixel of an image, per side.
    """

    def __init__(self, num_images: int = 24, columns: int = 6, zoom: int = 2) -> None:
        self.num_images = num_images
        self.columns = columns
        self.zoom = zoom
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.after_epoch = 0
        self._images: list[Tensor] = []
        self._prompts: list[str] = []
        self._sums: dict[str, tuple[float, int]] = {}
        """Sum and number of each name's scores; an image that a reward failed on has none."""

    def state_dict(self) -> dict[str, Any]:
        """The first validation's scores, so that a resumed run still compares with the base model."""
        return {"before": self.before, "after": self.after, "after_epoch": self.after_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = state_dict["before"], state_dict["after"]
        self.after_epoch = state_dict["after_epoch"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ConfigurationError if the base model would be evaluated on some of the prompts only."""
        if stage == "fit" and trainer.num_sanity_val_steps not in (0, float("inf")):
            raise ConfigurationError(
                f"BeforeAfter: expected trainer.num_sanity_val_steps -1 (or 0, for no comparison), "
                f"got {trainer.num_sanity_val_steps}"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._prompts, self._sums = [], [], {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Adds a batch's scores, and its images until the grid is full."""
        if sum(len(images) for images in self._images) < self.num_images:
            self._images.append(outputs["images"])
            self._prompts += outputs["prompts"]
        for name, scores in outputs["scores"].items():
            value, count = self._sums.get(name, (0.0, 0))
            scored = scores.values[scores.scored].double()
            self._sums[name] = (value + scored.sum().item(), count + len(scored))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the grid; the sanity check's is `before`, each later one `after`."""
        if not belongs_to_fit(trainer):
            return
        names = list(self._sums)
        sums = sum_over_processes([self._sums[name][0] for name in names])
        counts = sum_over_processes([self._sums[name][1] for name in names])
        means = {name: value / max(count, 1) for name, value, count in zip(names, sums, counts, strict=True)}
        if trainer.sanity_checking:
            self.before = means
        else:
            self.after, self.after_epoch = means, trainer.current_epoch + 1
        if trainer.is_global_zero:
            images, prompts = torch.cat(self._images)[: self.num_images], self._prompts[: self.num_images]
            path = run_folder(trainer) / ("before.png" if trainer.sanity_checking else "after.png")
            save_image(image_grid(images, self.columns, self.zoom, captions=prompts), path)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table, writes `before_after.json`, and says where everything is."""
        folder = run_folder(trainer)
        if self.before and self.after:
            self._compare(folder)
        if self.before and self.after_epoch != trainer.current_epoch:
            last = f"after.png and the table are of epoch {self.after_epoch}" if self.after else "there is no after.png"
            print(
                f"The run ended with epoch {trainer.current_epoch}, and the last validation was after epoch "
                f"{self.after_epoch}: {last}; trainer.check_val_every_n_epoch says how often"
            )
        print(f"Done: pictures, curves and checkpoints are in {folder}")

    def _compare(self, folder: Path) -> None:
        table = Table("", "before", f"after epoch {self.after_epoch}", "change", title="Fixed validation prompts")
        for name, before in self.before.items():
            after = self.after[name]
            table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
        Console().print(table)
        summary = {"before": self.before, "after": self.after, "after_epoch": self.after_epoch}
        write_text(folder / "before_after.json", json.dumps(summary, indent=2) + "\n")
