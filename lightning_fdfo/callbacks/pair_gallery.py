"""PairGallery: pairs as the rewards saw them, side by side, the winner framed."""

from __future__ import annotations

from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_fdfo.callbacks.captions import PAPER, draw_lines, line_height, wrap
from lightning_fdfo.callbacks.pictures import log_image, logged_step, pixels, save_image
from lightning_fdfo.checkpoints.run_folder import run_folder
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.module import FDFOModule
from lightning_fdfo.rollout.pairs import Rollout
from lightning_fdfo.rollout.scores import EpochScores, own_rows

WIDTH = 320
"""Pixels that a pair is enlarged to at least, so that its caption can be read."""
FRAME = 4
MARGIN = 12
FONT = 13
WINNER, LOSER = "#1a9850", "#cccccc"


class PairGallery(Callback):
    """Draws some of an epoch's pairs to `pairs/epoch=000.png` in the run's folder, and to loggers that take images.

    Both branches stand side by side; the one that the mixture prefers is framed. The caption has the prompt, and what
    each term adds to the difference of the totals, with its share of all that pulls, in percent:

        share_t = |difference_t| / sum_u |difference_u|

    The pairs are those of the first device, taken evenly in the order of how much they differ: the first pulls most,
    the last least.

    Args:
        every_n_epochs: >= 1.
        num_pairs: drawn in a gallery, at least 1.
        columns: pairs in a row.

    Raises:
        ConfigurationError: a number below 1.
    """

    def __init__(self, every_n_epochs: int = 10, num_pairs: int = 12, columns: int = 3) -> None:
        if min(every_n_epochs, num_pairs, columns) < 1:
            raise ConfigurationError(
                f"PairGallery: expected numbers of at least 1, got every_n_epochs={every_n_epochs}, "
                f"num_pairs={num_pairs}, columns={columns}"
            )
        self.every_n_epochs = every_n_epochs
        self.num_pairs = num_pairs
        self.columns = columns

    @torch.no_grad()
    def on_rollout_end(
        self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout, scores: EpochScores
    ) -> None:
        """Draws, on the first process."""
        if trainer.current_epoch % self.every_n_epochs or not trainer.is_global_zero:
            return
        flow = cast(FDFOModule, pl_module).flow
        own = own_rows(rollout.pairs)[::2]
        added = {name: column[own] for name, column in scores.contributions.items()}
        kept = scores.kept[list(rollout.pairs)].nonzero().flatten()
        chosen = kept[spread(scores.difference[own][kept].abs(), self.num_pairs)]
        with trainer.precision_plugin.forward_context():
            rows = torch.stack([2 * chosen, 2 * chosen + 1], dim=1).flatten()
            images = flow.decode(rollout.points.ends[rows].to(pl_module.device)).float().cpu()
        tiles = [
            pair_tile(
                images[2 * index : 2 * index + 2],
                rollout.prompts[pair],
                {name: column[pair].item() for name, column in added.items()},
            )
            for index, pair in enumerate(chosen.tolist())
        ]
        gallery = arrange(tiles, self.columns)
        folder = run_folder(trainer) / "pairs"
        save_image(gallery, folder / f"epoch={trainer.current_epoch:03d}.png")
        log_image(trainer, "pairs", gallery, logged_step(trainer, pl_module, trained=False))


def spread(values: Tensor, count: int) -> Tensor:
    """Rows of `count` values (or all), evenly in their order from the largest to the smallest.

    Example:
        >>> spread(torch.tensor([0.0, 3.0, 1.0, 4.0, 2.0]), 3)
        tensor([3, 4, 0])
    """
    order = values.argsort(descending=True, stable=True)
    return order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()]


def pair_tile(images: Tensor, prompt: str, contributions: dict[str, float]) -> Image.Image:
    """A pair with its caption.

    Args:
        images: [2, 3, H, W] in [0, 1].
        prompt: of both.
        contributions: name of a term -> what it adds to the half difference of the first branch.
    """
    zoom = max(1, -(-WIDTH // (2 * images.shape[-1])))
    left, right = (
        Image.fromarray(pixel).resize((images.shape[-1] * zoom, images.shape[-2] * zoom), Image.Resampling.NEAREST)
        for pixel in pixels(images)
    )
    width, height = 2 * left.width + 4 * FRAME, left.height + 2 * FRAME
    lines = wrap(prompt, width - 2 * FRAME, FONT) + caption(contributions)
    tile = Image.new("RGB", (width, height + len(lines) * line_height(FONT) + MARGIN), PAPER)
    draw = ImageDraw.Draw(tile)
    total = sum(contributions.values())
    for branch, image in enumerate((left, right)):
        corner = branch * width // 2
        if total and (total > 0) == (branch == 0):
            draw.rectangle((corner, 0, corner + image.width + 2 * FRAME - 1, height - 1), fill=WINNER)
        else:
            edges = (corner + FRAME - 1, FRAME - 1, corner + FRAME + image.width, FRAME + image.height)
            draw.rectangle(edges, outline=LOSER)
        tile.paste(image, (corner + FRAME, FRAME))
    draw_lines(tile, (FRAME, height + 2), lines, FONT)
    return tile


def caption(contributions: dict[str, float]) -> list[str]:
    """A line for each term: what it adds, and its share of the sum of absolute contributions.

    Example:
        >>> caption({"OCR": 0.3, "small": -0.1, "watched": 0.0})
        ['OCR  +0.3  75 %', 'small  -0.1  25 %']
    """
    total = sum(abs(value) for value in contributions.values())
    lines = [
        f"{name}  {value:+.3g}  {abs(value) / total:.0%}".replace("%", " %")
        for name, value in contributions.items()
        if value
    ]
    return lines or ["a tie"]


def arrange(tiles: list[Image.Image], columns: int) -> Image.Image:
    """Tiles in rows, each row as high as its highest."""
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    width = max(sum(tile.width + MARGIN for tile in row) for row in rows) + MARGIN
    heights = [max(tile.height for tile in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN), PAPER)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for tile in row:
            sheet.paste(tile, (left, top))
            left += tile.width + MARGIN
        top += height
    return sheet
