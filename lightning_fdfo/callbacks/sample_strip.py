"""SampleStrip: the fixed validation prompts at each validation, and side by side over epochs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_fdfo.callbacks.captions import INK, caption_size, draw_lines, font_for, line_height, wrap
from lightning_fdfo.callbacks.pictures import image_grid, log_image, logged_step, save_image
from lightning_fdfo.checkpoints.run_folder import belongs_to_fit, run_folder
from lightning_fdfo.errors import ConfigurationError

GAP = 2
MARGIN = 96
"""Pixels at least, beside the images: for their prompts."""


class SampleStrip(Callback):
    """Writes the first images of each validation, and all of them as one strip: a column per epoch, a row per prompt.

    `samples/epoch=000.png` (before training), … in the run's folder are grids, each image above its prompt. Loggers
    that take images get them too, as `samples` at the step of the epoch's numbers, and the first as `samples/before`
    at the step of epoch 0's. `samples.png` has the first images of each grid, as a strip; a resumed run extends it.

    Args:
        num_images: in a grid, at least 1.
        columns: of a grid, at least 1.
        rows: prompts of the strip, at least 1.
        zoom: pixels of the grid for each pixel of an image, per side; at least 1.

    Raises:
        ConfigurationError: a number below 1.
    """

    def __init__(self, num_images: int = 24, columns: int = 6, rows: int = 6, zoom: int = 1) -> None:
        if min(num_images, columns, rows, zoom) < 1:
            raise ConfigurationError(
                f"SampleStrip: expected numbers of at least 1, got num_images={num_images}, columns={columns}, "
                f"rows={rows}, zoom={zoom}"
            )
        self.num_images = num_images
        self.columns = columns
        self.rows = rows
        self.zoom = zoom
        self._images: list[Tensor] = []
        self._prompts: list[str] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._prompts = [], []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keeps images until a grid is full."""
        if sum(len(images) for images in self._images) < self.num_images:
            self._images.append(outputs["images"])
            self._prompts += outputs["prompts"]

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the grid and the strip."""
        if not belongs_to_fit(trainer) or not self._images:
            return
        images, prompts = torch.cat(self._images)[: self.num_images], self._prompts[: self.num_images]
        epoch = 0 if trainer.sanity_checking else trainer.current_epoch + 1
        grid = image_grid(images, self.columns, self.zoom, GAP, prompts)
        folder = run_folder(trainer) / "samples"
        save_image(grid, folder / f"epoch={epoch:03d}.png")
        key = "samples/before" if trainer.sanity_checking else "samples"
        log_image(trainer, key, grid, logged_step(trainer, pl_module, trained=not trainer.sanity_checking))
        size = images.shape[-1] * self.zoom, images.shape[-2] * self.zoom
        save_image(strip(folder, size, prompts, self.rows, self.columns), folder.with_suffix(".png"))


def strip(folder: Path, size: tuple[int, int], prompts: Sequence[str], rows: int, columns: int) -> Image.Image:
    """The first images of all grids of a folder, a column each below the epoch's number, a row each beside its prompt.

    Args:
        folder: with `epoch=000.png`, ….
        size: width and height of an image in a grid, pixels.
        prompts: of all images of a grid.
        rows: images taken of each, at most as many as there are prompts.
        columns: of the grids.
    """
    epochs = {int(found[1]): path for path in folder.glob("*.png") if (found := re.match(r"epoch=(\d+)", path.name))}
    width, height = size
    letters = caption_size(width)
    side, head = max(width, MARGIN), line_height(letters) + GAP
    max_lines = max(1, height // line_height(letters))
    rows = min(rows, len(prompts))
    sheet = Image.new("RGB", (side + len(epochs) * (width + GAP) + GAP, head + rows * (height + GAP)), "white")
    for row, prompt in enumerate(prompts[:rows]):
        draw_lines(sheet, (GAP, head + row * (height + GAP)), wrap(prompt, side - GAP, letters, max_lines), letters)
    draw = ImageDraw.Draw(sheet)
    for column, epoch in enumerate(sorted(epochs)):
        left = side + GAP + column * (width + GAP)
        draw.text((left + width / 2, 1), str(epoch), fill=INK, font=font_for("", letters), anchor="ma")
        with Image.open(epochs[epoch]) as grid:
            pitch = (grid.height - GAP) // -(-len(prompts) // columns)  # of its rows: an image, its caption and a gap
            for row in range(rows):
                corner = [GAP + (row % columns) * (width + GAP), GAP + (row // columns) * pitch]
                tile = grid.crop((corner[0], corner[1], corner[0] + width, corner[1] + height))
                sheet.paste(tile, (left, head + row * (height + GAP)))
    return sheet
