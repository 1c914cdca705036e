"""(e) How long commands take to start, against `import torch` in a process as new as theirs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from tests.benchmarks.report import ROOT, Table
from tests.benchmarks.timing import ROUNDS, interleaved, median, ratio, within

UNIT = "import torch"
IMPORTS = {UNIT: "import torch", "import lightning_fdfo": "import lightning_fdfo"}
"""What is imported -> a program for `python -c`."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "--help": ("--help",),
    "rewards": ("rewards",),
    "fit --help": ("fit", "--help"),
    "fit, to the first rollout": (
        *("fit", "--config", "configs/quickstart.yaml", "--trainer.num_sanity_val_steps=0"),
        "--trainer.callbacks+=tests.benchmarks.startup.EndAtRollout",
    ),
}
"""What is measured -> words of the command line."""
LIMITS = {"--help": 1.5, "rewards": 1.5, "fit --help": 3.0, "fit, to the first rollout": 5.0}
COLUMNS = {
    "what": "what",
    "seconds": "s",
    "ratio": "against `import torch` (95 %)",
    "limit": "limit",
    "within": "kept",
}


class EndAtRollout(Callback):
    """Ends the process, at once and without an error, when the first rollout begins."""

    def on_rollout_batch_start(self, trainer: Any, pl_module: Any) -> None:
        os._exit(0)


def run(words: list[str]) -> None:
    """Runs Python with these words, with bytecode kept, as where a package is installed.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, check=True)


def seconds(name: str) -> float:
    """From the start of a new process to its end."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run(words_of(name, Path(folder)))
        return time.perf_counter() - start


def words_of(name: str, folder: Path) -> list[str]:
    """For Python; a run goes to a folder of its own."""
    if name in IMPORTS:
        return ["-c", IMPORTS[name]]
    own = [f"--trainer.default_root_dir={folder}"] if "--config" in COMMANDS[name] else []
    return ["-m", "lightning_fdfo", *COMMANDS[name], *own]


def measure(quick: bool = False) -> Table:
    """A row for each command; a first round, in which files come from the disk, is not counted."""
    rounds = 1 if quick else ROUNDS
    runs = {name: partial(seconds, name) for name in (*IMPORTS, *COMMANDS)}
    if not quick:
        interleaved(runs, 1)
    measured = interleaved(runs, rounds)
    rows = []
    for name, times in measured.items():
        against, limit = ratio(times, measured[UNIT]), LIMITS.get(name)
        row = {"what": f"`{name}`", "seconds": median(times), "ratio": against, "each": times}
        rows.append(row | ({"limit": limit, "within": within(against.value, limit)} if limit else {}))
    return Table("startup", "Start-up", COLUMNS, rows, f"medians of {rounds} new processes, in turns")
