"""What a run of the benchmarks leaves: one JSON, one page of tables, and the same tables in docs/performance.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from lightning_fdfo.files import format_bytes, write_text
from tests.benchmarks.timing import Estimate

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "numpy")
END = "<!-- end of table -->"


@dataclass(frozen=True)
class Table:
    """What one part has measured."""

    part: str
    """its name on the command line"""
    title: str
    columns: Mapping[str, str]
    """key of a row -> heading; keys of a row that are no column stand in the JSON alone"""
    rows: Sequence[Mapping[str, Any]]
    rounds: str
    """what a number is the median of"""

    def markdown(self, where: str) -> str:
        """The table, and under it how and where it was measured."""
        lines = ["| " + " | ".join(self.columns.values()) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in self.columns) + " |" for row in self.rows]
        return "\n".join([*lines, "", f"{self.title}: {self.rounds}. {where}"])


def _cell(value: Any) -> str:
    """A number for people.

    Example:
        >>> _cell(1.23456), _cell(45.678), _cell(0.0123456), _cell(3), _cell(Estimate(1.0, 0.99, 1.02))
        ('1.235', '45.7', '0.0123', '3', '1.000 (0.990–1.020)')
    """
    if isinstance(value, Estimate):
        return f"{_cell(value.value)} ({_cell(value.low)}–{_cell(value.high)})"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    return f"{value:.3g}" if size < 0.1 else f"{value:.3f}" if size < 10 else f"{value:.1f}"


def _plain(value: Any) -> Any:
    """With names of an estimate's numbers, which JSON would leave out."""
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def machine() -> dict[str, Any]:
    """Where it runs."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": format_bytes(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def cpu_model() -> str:
    """The processor's name, as Linux tells it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def versions() -> dict[str, str]:
    """What runs: packages, and this one with its commit."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    own = {"lightning-fdfo": version("lightning-fdfo"), "commit": commit, "python": platform.python_version()}
    return own | {name: version(name) for name in PACKAGES}


@dataclass(frozen=True)
class Report:
    """All tables of a run, and where and when they were measured."""

    tables: Sequence[Table]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    date: str

    @classmethod
    def of(cls, tables: Sequence[Table], command: str, machine: Mapping[str, Any]) -> Report:
        """A report of now; `machine` is asked for before the first run, which makes its own load."""
        return cls(tables, machine, versions(), command, time.strftime("%Y-%m-%d", time.gmtime()))

    @property
    def where(self) -> str:
        """A line under each table."""
        packages = ", ".join(f"{name} {self.versions[name]}" for name in PACKAGES[:4])
        return (
            f"`{self.command}`, {self.date}, commit {self.versions['commit']}, {self.machine['cpu']} with "
            f"{self.machine['cores']} cores, load before {self.machine['load_before']}, "
            f"Python {self.versions['python']}, {packages}."
        )

    def write(self, folder: Path) -> None:
        """Writes `benchmarks.json` and `benchmarks.md`."""
        write_text(folder / "benchmarks.json", json.dumps(_plain(asdict(self)), indent=1) + "\n")
        text = "\n\n".join(f"## {table.part}\n\n{table.markdown(self.where)}" for table in self.tables)
        write_text(folder / "benchmarks.md", f"{text}\n")

    def into(self, page: Path) -> None:
        """Puts each table between its two marks of a page; tables of other parts stay."""
        text = page.read_text(encoding="utf-8")
        for table in self.tables:
            text = with_table(text, table.part, table.markdown(self.where))
        write_text(page, text)


def with_table(text: str, part: str, table: str) -> str:
    """A page with a table between its two marks.

    Raises:
        ValueError: the page has no such marks.

    Example:
        >>> page = "a\\n<!-- table: growth -->\\nold\\n<!-- end of table -->\\nb\\n"
        >>> with_table(page, "growth", "new").split("\\n")
        ['a', '<!-- table: growth -->', '', 'new', '', '<!-- end of table -->', 'b', '']
    """
    start = f"<!-- table: {part} -->\n"
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"expected {start.strip()} and {END} in the page, around the table of {part}")
    return f"{before}{start}\n{table}\n\n{END}{after}"
