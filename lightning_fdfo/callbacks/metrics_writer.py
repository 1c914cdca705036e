"""MetricsWriter: the results of `test`, as files and as a table."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Column, Table

from lightning_fdfo.callbacks.provenance import describe_weights
from lightning_fdfo.checkpoints.run_folder import numbered_folder, run_folder
from lightning_fdfo.evaluation.comparison import SIDES, Estimate, MetricRow
from lightning_fdfo.evaluation.win_rate import WinRate
from lightning_fdfo.files import write_text
from lightning_fdfo.module import FDFOModule

WIDTH = 120
"""Characters a line, where there is no terminal."""


class MetricsWriter(Callback):
    """Writes `metrics.json` and `metrics.csv` into `test/0`, `test/1`, … of the run's folder, and prints a table.

    The command line adds it to `test`.
    """

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(FDFOModule, pl_module)
        data, rows = trainer.datamodule, module.comparison  # type: ignore[attr-defined]
        folder = numbered_folder(run_folder(trainer) / "test")
        settings = {
            **describe_weights(trainer, module),
            "seed": module.seed,
            "num_prompts": len(data.evaluation_prompts),
            "images_per_prompt": data.images_per_prompt,
            "confidence": module.evaluation.confidence,
        }
        summary = settings | {"metrics": {row.name: _nested(row) for row in rows}}
        write_text(folder / "metrics.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / "metrics.csv", table_of_values(rows))
        console = Console() if Console().is_terminal else Console(width=WIDTH)
        console.print(table(rows, module.evaluation.confidence))
        console.print(f"Written to {folder}", highlight=False, soft_wrap=True)


def _nested(row: MetricRow) -> dict[str, Any]:
    """A row for JSON, which has no NaN."""
    columns = [("tuned", row.tuned), ("base", row.base), ("difference", row.difference), ("win_rate", row.win_rate)]
    return {
        name: {key: None if math.isnan(value) else value for key, value in column._asdict().items()}
        for name, column in columns
        if column is not None
    }


def table_of_values(rows: list[MetricRow]) -> str:
    """Rows as CSV; a value that was not computed is an empty cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = [column for side in SIDES for column in (side, f"{side}_standard_error")]
    writer.writerow(["metric", *columns, "win_rate", "win_rate_low", "win_rate_high"])
    for row in rows:
        estimates = [value for side in SIDES for value in (getattr(row, side) or (math.nan, math.nan))]
        values = [*estimates, *(row.win_rate or (math.nan,) * 3)]
        writer.writerow([row.name, *("" if math.isnan(value) else repr(value) for value in values)])
    return file.getvalue()


def table(rows: list[MetricRow], confidence: float) -> Table:
    """Rows for a terminal: means ± standard errors, win rates with their intervals."""
    caption = f"means ± standard errors; win rates with intervals of {confidence:.0%}"
    shown = Table(Column(no_wrap=True), *SIDES, "win rate", title="Test", caption=caption)
    for row in rows:
        shown.add_row(row.name, _short(row.tuned), _short(row.base), _short(row.difference, "+"), _rate(row.win_rate))
    return shown


def _short(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None or math.isnan(estimate.mean):
        return ""
    error = "" if math.isnan(estimate.standard_error) else f" ± {estimate.standard_error:.2g}"
    return f"{estimate.mean:{sign}.4g}{error}"


def _rate(rate: WinRate | None) -> str:
    if rate is None or math.isnan(rate.rate):
        return ""
    interval = "" if math.isnan(rate.low) else f" ({rate.low:.1%} to {rate.high:.1%})"
    return f"{rate.rate:.1%}{interval}"
