"""The page: settings, curves, correlations, galleries and metrics of a run, self-contained.

How it is made:

    RunFiles --pictures as data URIs, plots as SVG--> template.html --> one file
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torchmetrics.functional.regression import spearman_corrcoef

from lightning_fdfo.callbacks.curves import PANELS, History, plain_axes
from lightning_fdfo.report.run_files import RunFiles

MAX_PICTURES = 40
"""Of a gallery: of more epochs, as many are shown, evenly."""
MAX_WIDTH = 1400
"""Pixels to which a gallery is shrunk."""
SETTINGS = {
    "Base model": "model.flow.init_args.pretrained",
    "Seed": "seed_everything",
    "Image size": "model.sampling.height, model.sampling.width",
    "Steps of a rollout": "model.sampling.num_steps",
    "Steps of an evaluation": "model.evaluation.num_steps",
    "Churn": "model.sampling.churn",
    "Guidance scale": "model.sampling.guidance_scale",
    "Pairs an epoch": "model.batching.num_pairs",
    "Updates an epoch": "model.batching.updates_per_epoch",
    "LoRA rank, alpha": "model.lora.rank, model.lora.alpha",
    "Optimiser": "model.optimizer.class_path",
    "Learning rate": "model.optimizer.init_args.lr",
    "Clip range": "model.objective.clip_range",
    "Precision": "trainer.precision",
    "Devices": "trainer.devices",
}
"""What stands at the top, and where the configuration has it."""


class Slide(NamedTuple):
    """A picture of a gallery."""

    epoch: int
    source: str
    """a data URI"""


def render_page(run: RunFiles) -> str:
    """The whole page as HTML; everything that comes from the run is escaped."""
    environment = Environment(
        loader=PackageLoader("lightning_fdfo.report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["number"] = lambda value: f"{value:.4g}"
    return environment.get_template("template.html").render(
        title=run.folder.resolve().name,
        settings=settings_of(run.config),
        rewards=_rewards(run.config),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        alarms=run.alarms,
        before_after=_change(run.before_after),
        after_epoch=run.before_after.get("after_epoch"),
        tests=[(name, *_table(metrics)) for name, metrics in run.tests.items()],
        panels={title: plots for title, plots in _panels(run.history).items() if plots},
        correlations=correlations(run.pairs),
        num_pairs=len(run.pairs),
        galleries={title: slides for title, files in run.galleries.items() if (slides := list(_slides(files)))},
    )


def correlations(pairs: list[dict[str, str]]) -> tuple[list[str], list[list[float | None]]]:
    """Spearman's rank correlation of the rewards' half differences, first branch's less second's.

    Args:
        pairs: rows with `NAME/first` and `NAME/second`, as `PairLog` writes them.

    Returns:
        Names, and a row and a column for each; None where fewer than three pairs have both, or one never differs.

    Example:
        >>> scores = [(0, 0), (1, -2), (2, -1), (3, -3)]
        >>> rows = [{"a/first": f"{a}", "a/second": "0", "b/first": f"{b}", "b/second": "0"} for a, b in scores]
        >>> names, table = correlations(rows)
        >>> names, [[round(value, 3) for value in row] for row in table]
        (['a', 'b'], [[1.0, -0.8], [-0.8, 1.0]])
    """
    names = [name.removesuffix("/first") for name in (pairs[0] if pairs else {}) if name.endswith("/first")]
    differences = np.array(
        [[_float(row[f"{name}/first"]) - _float(row[f"{name}/second"]) for row in pairs] for name in names]
    )
    return names, [[_correlation(one, other) for other in differences] for one in differences]


def _correlation(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float | None:
    both = ~(np.isnan(one) | np.isnan(other))
    one, other = one[both], other[both]
    if len(one) < 3 or not np.ptp(one) or not np.ptp(other):
        return None
    if np.array_equal(one, other):
        return 1.0
    return round(spearman_corrcoef(torch.from_numpy(one), torch.from_numpy(other)).item(), 6)


def _float(cell: str | None) -> float:
    return float(cell) if cell else np.nan


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that a reader asks for first, by what they are called."""
    return {name: value for name, path in SETTINGS.items() if (value := _setting(config, path))}


def _setting(config: Mapping[str, Any], paths: str) -> str:
    found = []
    for path in paths.split(", "):
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found.append(str(value))
    return ", ".join(found)


def _rewards(config: Mapping[str, Any]) -> dict[str, str]:
    """The mixture, a line per term."""
    terms = (config.get("model") or {}).get("rewards") or {}
    return {
        name: yaml.safe_dump(term, default_flow_style=True, width=1000).strip(" .\n") for name, term in terms.items()
    }


def _change(before_after: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    before, after = before_after.get("before") or {}, before_after.get("after") or {}
    return [(name, before[name], after[name]) for name in before if name in after]


def _table(metrics: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns and rows of what `lightning-fdfo test` has written."""
    rows = metrics.get("metrics") or {}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return columns, [(name, [_cell(row.get(column) or {}) for column in columns]) for name, row in rows.items()]


def _cell(estimate: Mapping[str, float | None]) -> str:
    """A mean with its standard error, or a win rate with its interval."""
    values = {name: value for name, value in estimate.items() if value is not None}
    if "mean" in values:
        return f"{values['mean']:.4g}" + (f" ± {values['standard_error']:.2g}" if "standard_error" in values else "")
    if "rate" not in values:
        return ""
    return f"{values['rate']:.1%}" + (f" ({values['low']:.1%} to {values['high']:.1%})" if "low" in values else "")


def _panels(history: History) -> dict[str, dict[str, Markup]]:
    """Title -> name of a number -> its plot."""
    panels = {}
    for title, names in ({"total reward": r"reward/(mean|std|difference)"} | PANELS).items():
        found = {re.sub(names, r"\1", name): points for name, points in history.items() if re.fullmatch(names, name)}
        panels[title] = {name: plot(points) for name, points in found.items()}
    return panels


def plot(points: list[tuple[int, float]]) -> Markup:
    """A little curve as SVG, whose letters are text."""
    figure = Figure(figsize=(2.9, 1.7), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        *zip(*points, strict=True), "-" if len(points) > 30 else ".-", linewidth=1.2, markersize=4, color="#2166ac"
    )
    plain_axes(axes, [value for _, value in points])
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Markup(file.getvalue()[file.getvalue().index("<svg") :])


def _slides(files: Mapping[int, Path]) -> Iterator[Slide]:
    epochs = sorted(files)
    chosen = np.unique(np.linspace(0, len(epochs) - 1, min(MAX_PICTURES, len(epochs))).round().astype(int))
    for place in chosen:
        with Image.open(files[epochs[place]]) as picture:
            picture.thumbnail((MAX_WIDTH, 100 * MAX_WIDTH))
            file = io.BytesIO()
            picture.convert("RGB").save(file, format="webp", quality=85)
        yield Slide(epochs[place], f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}")
