"""Curves: what a run has logged, over epochs, as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_fdfo.callbacks.pictures import log_image, logged_step, render, save_image
from lightning_fdfo.callbacks.run_folder import judges_a_fit, run_folder

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
    little plot of its own, for their units differ: rewards, their shares of the pull, ties, validation, image
    statistics, and training.
    """

    def __init__(self) -> None:
        self.history: History = {}

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the curves up where they stopped."""
        self.history = state_dict["history"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes a validation's means."""
        if judges_a_fit(trainer):
            self._note(trainer, 0 if trainer.sanity_checking else trainer.current_epoch + 1, validation=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes an epoch's means."""
        self._note(trainer, trainer.current_epoch + 1, validation=False)

    def _note(self, trainer: Trainer, epoch: int, validation: bool) -> None:
        for name, value in trainer.callback_metrics.items():
            if "/" in name and name.startswith("val/") == validation:
                self.history.setdefault(name, []).append((epoch, value.item()))

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws."""
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
    """A little plot a number, in the order of `PANELS`, a row or more each."""
    panels = {title: [name for name in history if re.fullmatch(names, name)] for title, names in PANELS.items()}
    rows = [(title, names[i : i + columns]) for title, names in panels.items() for i in range(0, len(names), columns)]
    figure = Figure(figsize=(2.6 * columns, 1.9 * max(len(rows), 1)), layout="constrained")
    grid = figure.subplots(max(len(rows), 1), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for (title, names), line in zip(rows, grid, strict=False):
        for name, axes in zip(names, line, strict=False):
            _plot(axes, history[name], re.sub(PANELS[title], r"\1", name))
        line[0].set_ylabel(title)
    return figure


def _plot(axes: Axes, points: Sequence[tuple[int, float]], title: str) -> None:
    axes.set_visible(True)
    axes.plot(*zip(*points, strict=True), "-" if len(points) > 30 else ".-", linewidth=1, markersize=4)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
