"""What a run has left in its folder, read back."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_fdfo.callbacks.curves import History
from lightning_fdfo.errors import ConfigurationError


@dataclass(frozen=True)
class RunFiles:
    """The files of a run. A file that is missing leaves its field empty.

    Args:
        folder: the run's.
        config: its settings, as they were resolved; of the last start.
        history: name of a logged number -> (epoch, value), ….
        pairs: a row per pair, of the last epochs, see `PairLog`.
        galleries: title -> epoch -> picture.
        before_after: `before`, `after` and `after_epoch`, see `BeforeAfter`.
        tests: name of a folder of `lightning-fdfo test` -> its `metrics.json`.
        alarms: of `RewardHackingMonitor`.
    """

    folder: Path
    config: dict[str, Any]
    history: History
    pairs: list[dict[str, str]]
    galleries: dict[str, dict[int, Path]]
    before_after: dict[str, Any]
    tests: dict[str, dict[str, Any]]
    alarms: list[dict[str, Any]]

    @staticmethod
    def read(folder: Path, last_epochs: int = 20) -> RunFiles:
        """Reads a run's folder; pairs are those of the last epochs.

        Raises:
            ConfigurationError: it holds no run, or a file of it cannot be read.
        """
        configs = sorted(folder.glob("config*.yaml"), key=_number)
        if not configs:
            raise ConfigurationError(f"{folder} holds no run: expected the folder of a `lightning-fdfo fit`")
        tables = dict(sorted(_by_epoch(folder / "pairs", "csv").items())[-last_epochs:])
        return RunFiles(
            folder=folder,
            config=_mapping(configs[-1], yaml.safe_load),
            history=_history(folder),
            pairs=[row for path in tables.values() for row in _read(path, _rows)],
            galleries={
                "Validation prompts": _by_epoch(folder / "samples", "png"),
                "Pairs": _by_epoch(folder / "pairs", "png"),
            },
            before_after=_json(folder / "before_after.json"),
            tests={path.parent.name: _json(path) for path in sorted(folder.glob("test/*/metrics.json"), key=_number)},
            alarms=_json(folder / "reward_hacking.json").get("events", []),
        )


def _number(path: Path) -> tuple[int, str]:
    """Orders config.yaml, config-1.yaml, …, and test/0, test/1, …, by their numbers."""
    found = re.findall(r"\d+", f"{path.parent.name}/{path.name}" if path.suffix == ".json" else path.stem)
    return (int(found[-1]) if found else 0, path.name)


def _by_epoch(folder: Path, suffix: str) -> dict[int, Path]:
    files = {re.fullmatch(rf"epoch=(\d+)\.{suffix}", path.name): path for path in sorted(folder.glob(f"*.{suffix}"))}
    return {int(found[1]): path for found, path in files.items() if found}


def _history(folder: Path) -> History:
    """Logged numbers of all starts of the run; where two starts logged one epoch, the later one counts."""
    values: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: _number(path.parent)):
        for row in _read(path, _rows):
            epoch = int(row.pop("epoch", None) or 0)
            for name, value in row.items():
                if value and "/" in name:
                    values.setdefault(name, {})[epoch + 1] = float(value)
    for name, before in _json(folder / "before_after.json").get("before", {}).items():
        values.setdefault(f"val/{name}", {})[0] = before  # loggers do not get the validation before training
    return {name: sorted(points.items()) for name, points in values.items()}


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def _json(path: Path) -> dict[str, Any]:
    return _mapping(path, json.loads) if path.exists() else {}


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    found = _read(path, parse)
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} cannot be read: expected a mapping, got {type(found).__name__}")
    return found


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
