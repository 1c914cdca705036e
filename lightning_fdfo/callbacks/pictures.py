"""Pictures: images side by side, in a file, in a logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightning_fdfo.callbacks.captions import PAPER, caption_size, draw_lines, line_height, wrap
from lightning_fdfo.files import atomic_path


def image_grid(
    images: Tensor, columns: int, zoom: int = 1, gap: int = 2, captions: Sequence[str] | None = None
) -> Image.Image:
    """Images side by side, in rows, each above its caption.

    Args:
        images: [N, 3, H, W] in [0, 1].
        columns: images in a row.
        zoom: pixels of the grid for each pixel of an image, per side; >= 1.
        gap: pixels of grey between images.
        captions: N texts, wrapped and shortened to the images' width; None for none.

    Example:
        >>> import torch
        >>> image_grid(torch.ones(3, 3, 8, 16), columns=2).size
        (38, 22)
    """
    count, _, height, width = images.shape
    width, height = width * zoom, height * zoom
    size = caption_size(width)
    texts = [wrap(text, width - 4, size) for text in captions or ()]
    foot = max(map(len, texts), default=0) * line_height(size) + (4 if texts else 0)
    rows = -(-count // columns)
    frame = (columns * (width + gap) + gap, rows * (height + foot + gap) + gap)
    sheet = Image.new("RGB", frame, (128, 128, 128))
    for index, pixel in enumerate(pixels(images)):
        row, column = divmod(index, columns)
        left, top = gap + column * (width + gap), gap + row * (height + foot + gap)
        sheet.paste(Image.fromarray(pixel).resize((width, height), Image.Resampling.NEAREST), (left, top))
        if texts:
            sheet.paste(PAPER, (left, top + height, left + width, top + height + foot))
            draw_lines(sheet, (left + 2, top + height + 1), texts[index], size)
    return sheet


def pixels(images: Tensor) -> NDArray[np.uint8]:
    """[N, 3, H, W] in [0, 1] as [N, H, W, 3], 0 to 255."""
    bytes_: NDArray[np.uint8] = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return bytes_


def save_image(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Writes a PNG, which is complete or as it was; makes its folder if need be.

    Args:
        image: to write.
        path: its file.
        texts: keyword -> text, for the PNG's text chunks (iTXt, which is UTF-8).
    """
    chunks = PngInfo()
    for keyword, text in (texts or {}).items():
        chunks.add_itxt(keyword, text)
    with atomic_path(path) as partial:
        image.save(partial, format="png", pnginfo=chunks)


def render(figure: Figure) -> Image.Image:
    """A figure as a picture."""
    figure.set_dpi(120)
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib types it in part
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def log_image(trainer: Trainer, key: str, image: Image.Image, step: int) -> None:
    """Gives a picture to each logger that takes images: those with `log_image` (W&B, MLflow, …), and TensorBoard.

    Args:
        trainer: whose loggers.
        key: the picture's name.
        image: to log.
        step: of the numbers that it belongs to, see `logged_step`.
    """
    for logger in trainer.loggers:
        experiment = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            logger.log_image(key=key, images=[image], step=step)
        elif experiment is not None and hasattr(experiment, "add_image"):
            experiment.add_image(key, np.asarray(image), step, dataformats="HWC")


def logged_step(trainer: Trainer, pl_module: LightningModule, trained: bool) -> int:
    """The step that an epoch's numbers are logged at: its last optimiser step.

    Args:
        trainer: of the run.
        pl_module: the FDFOModule.
        trained: whether the epoch's optimiser steps are done, as after training and in its validation; they are not in
            a rollout, nor before the first epoch.
    """
    coming: int = 0 if trained else pl_module.batching.updates_per_epoch  # type: ignore[union-attr,assignment]
    return trainer.global_step + coming - 1
