"""The command `lightning-fdfo report RUN_DIR`: one page about a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_fdfo.commands.function_parser import run_function
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import write_text
from lightning_fdfo.report.page import render_page
from lightning_fdfo.report.run_files import RunFiles

GENERATOR = 'name="generator" content="lightning-fdfo report"'
"""Every report has it near its head: only a file with it is written over."""


def main(arguments: Sequence[str]) -> None:
    """Runs `lightning-fdfo report …`; raises ConfigurationError for what the user can fix."""
    path = run_function(write_report, "lightning-fdfo report", arguments)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Writes one HTML page about a run, which needs no network to be read.

    An earlier report is replaced, another file is not.

    Args:
        folder: of a run: its trainer.default_root_dir
        output: default: report.html in that folder

    Returns:
        Where the page is.

    Raises:
        ConfigurationError: no run, a file that cannot be read or written, or one in the way that is no report.
    """
    path = output or folder / "report.html"
    try:
        if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise ConfigurationError(f"{path} exists and is no report: choose another --output")
        write_text(path, render_page(RunFiles.read(folder)))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error}") from error
    return path
