"""Runs the benchmarks: python -m tests.benchmarks [--only PART …] [--quick] [--out FOLDER] [--page PAGE]."""

from __future__ import annotations

import argparse
import importlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.report import Report, Table, machine

PARTS = ("overhead", "epoch_split", "growth", "memory", "startup")
"""Modules of this folder, with a function `measure(quick) -> Table` each."""


def main(words: Sequence[str] | None = None) -> Report:
    """Runs the parts that are asked for, and writes what they have measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="the smallest size, once: tries the benchmarks themselves")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the JSON and the tables")
    parser.add_argument("--page", type=Path, help="page whose tables are replaced, docs/performance.md say")
    given = parser.parse_args(words)
    here, tables = machine(), []
    for part in given.only:
        start = time.perf_counter()
        table: Table = importlib.import_module(f"tests.benchmarks.{part}").measure(given.quick)
        tables.append(table)
        print(f"{part}: {time.perf_counter() - start:.0f} s\n\n{table.markdown('')}\n", flush=True)
    only = "" if given.only == PARTS else f" --only {shlex.join(given.only)}"
    command = f"python -m tests.benchmarks{only}{' --quick' * given.quick}"
    report = Report.of(tables, command, here)
    report.write(given.out)
    if given.page is not None:
        report.into(given.page)
    return report


if __name__ == "__main__":
    main()
