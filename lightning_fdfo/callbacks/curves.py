"""Curves: the logged numbers of a run over epochs, as pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from lightning_fdfo.callbacks.pictures import log_image, logged_step, render, save_image
from lightning_fdfo.checkpoints.run_folder import belongs_to_fit, run_folder
from lightning_fdfo.training.protocol import TrainingModule

History = dict[str, list[tuple[int, float]]]
"""Name of a logged number -> (epoch, value), ...; epoch 0 is before training, 1 after the first."""
PANELS = {
    "rewards": r"reward/([^/]+)/mean",
    "share of the pull": r"reward/([^/]+)/share",
    "ties": r"reward/([^/]+)/ties",
    "validation": r"val/(.+)",
    "images": r"image/(.+)",
    "training": r"train/(drift|ratio|clip_fraction|grad_norm)",
}
"""Of `curves.png`: its title, and the names of its curves."""


class Curves(Callback):
    """Draws the mean reward of rollouts and validations to `reward_curve.png`, and all else to `curves.png`.

    At the end of `fit`, into the run's folder, and to loggers that take images. In `curves.png` each number has a
    small plot of its own, because their units differ: rewards, their shares of the pull, ties, validation, image
    statistics, and training.
    """

    def __init__(self) -> None:
        self.history: History = {}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if belongs_to_fit(trainer):
            names = [name for name in trainer.callback_metrics if name.startswith("val/")]
            self._note(trainer, 0 if trainer.sanity_checking else trainer.current_epoch + 1, names)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, trainer.current_epoch + 1, sorted(cast(TrainingModule, pl_module).epoch_log.names))

    def _note(self, trainer: Trainer, epoch: int, names: Sequence[str]) -> None:
        for name in names:
            self.history.setdefault(name, []).append((epoch, trainer.callback_metrics[name].item()))

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, figure in (("reward_curve", reward_curve(self.history)), ("curves", curves(self.history))):
            picture = render(figure)
            save_image(picture, run_folder(trainer) / f"{name}.png")
            log_image(trainer, name, picture, logged_step(trainer, pl_module, trained=True))


def reward_curve(history: History) -> Figure:
    """The mean reward of rollouts and validations."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, style, label in (("reward/mean", "-", "rollouts"), ("val/reward", "o-", "validation, no churn")):
        if name in history:
            axes.plot(*zip(*history[name], strict=True), style, label=label, markersize=4)
    axes.set(xlabel="epoch", ylabel="mean reward")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure


def curves(history: History, columns: int = 5) -> Figure:
    """A small plot for each number, in the order of `PANELS`, row after row; a panel's first plot has its title."""
    plots = []
    for title, names in PANELS.items():
        found = [name for name in history if re.fullmatch(names, name)]
        plots += [(name, re.sub(names, r"\1", name), title if name == found[0] else "") for name in found]
    rows = max(1, -(-len(plots) // columns))
    height = 1.9 * rows
    figure = Figure(figsize=(2.6 * columns, height))
    # Margins in inches: a layout engine draws all text twice, which takes longer than the rest.
    grid = figure.add_gridspec(
        rows, columns, left=0.05, right=0.99, bottom=0.25 / height, top=1 - 0.25 / height, hspace=0.36, wspace=0.4
    )
    for index, (name, label, title) in enumerate(plots):
        axes = figure.add_subplot(grid[divmod(index, columns)])
        _plot(axes, history[name], label)
        axes.set_ylabel(title, fontsize=9, fontweight="bold")
    return figure


def _plot(axes: Axes, points: Sequence[tuple[int, float]], title: str) -> None:
    axes.plot(*zip(*points, strict=True), "-" if len(points) > 30 else ".-", linewidth=1, markersize=4)
    plain_axes(axes, [value for _, value in points])
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def plain_axes(axes: Axes, values: Sequence[float]) -> None:
    """Four ticks or fewer, of full numbers; what is constant but for rounding is a flat line.

    Args:
        axes: of a small plot over epochs.
        values: drawn in it.
    """
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    finite = [value for value in values if math.isfinite(value)]
    if finite and max(finite) - min(finite) <= 1e-6 * max(map(abs, finite)):
        half = abs(finite[0]) / 2 or 1.0
        axes.set_ylim(finite[0] - half, finite[0] + half)
