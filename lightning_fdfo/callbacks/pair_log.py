"""PairLog: a table of each epoch's pairs, with every term's scores and contribution."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_fdfo.checkpoints.run_folder import run_folder
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import atomic_path
from lightning_fdfo.module import FDFOModule
from lightning_fdfo.rollout.pairs import Rollout
from lightning_fdfo.rollout.scores import EpochScores


class PairLog(Callback):
    """Writes `pairs/epoch=000.csv` and so on into the run's folder, as soon as an epoch has been rolled out.

    One row for each pair of all devices, in the order of the global pair index. The columns:

    | column | what it holds |
    |---|---|
    | `epoch` | from 0 |
    | `pair` | global index in the epoch, from 0 |
    | `prompt` | its text |
    | `dropped` | 1 if a reward failed on it, and it did not train; else 0 |
    | `difference` | half difference of the total, first branch's; before `reward_scale`, `reward_clip` |
    | `NAME/first`, `NAME/second` | a reward's score of each branch, in its own units |
    | `NAME/part` | what it added to `difference`: scaled, clipped, weighed, routed, gated |
    | `NAME/share` | part / difference; 0 for one that added nothing; empty if the difference is 0 |

    A cell is empty where there is no value: a score of a reward that failed, or that was not to score the prompt's
    images; differences of a dropped pair. Numbers have nine digits, which distinguish all float32 values. The first
    process writes, under a temporary name, which it then changes; an epoch that is rolled out again after a resume
    gives the same file again.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, FDFOModule):
            raise ConfigurationError(f"PairLog: expected an FDFOModule, got {type(pl_module).__name__}")

    def on_rollout_end(
        self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout, scores: EpochScores
    ) -> None:
        """Writes the table, of all devices' pairs."""
        if not trainer.is_global_zero:
            return
        epoch = trainer.current_epoch
        rows = list(pair_rows(scores, epoch))
        table = run_folder(trainer) / "pairs" / f"epoch={epoch:03d}.csv"
        with atomic_path(table) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def pair_rows(epoch_scores: EpochScores, epoch: int) -> Iterator[dict[str, str | int]]:
    """The rows of `PairLog`'s table.

    Args:
        epoch_scores: of P pairs.
        epoch: the current one.
    """
    kept, differences = epoch_scores.kept.tolist(), epoch_scores.difference.tolist()
    values = {name: one.values.tolist() for name, one in epoch_scores.scores.items()}
    scored = {name: one.scored.tolist() for name, one in epoch_scores.scores.items()}
    added = {name: column.tolist() for name, column in epoch_scores.contributions.items()}
    for pair, prompt in enumerate(epoch_scores.prompts):
        first = 2 * pair
        difference = differences[first] if kept[pair] else None
        row: dict[str, str | int] = {"epoch": epoch, "pair": pair, "prompt": prompt, "dropped": int(not kept[pair])}
        row["difference"] = _cell(difference)
        for name in values:
            for index, branch in enumerate(("first", "second"), start=first):
                row[f"{name}/{branch}"] = _cell(values[name][index] if scored[name][index] else None)
            row[f"{name}/part"] = _cell(added[name][first] if kept[pair] else None)
            row[f"{name}/share"] = _cell(added[name][first] / difference if difference else None)
        yield row


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value + 0.0:.9g}"  # + 0.0: no -0
