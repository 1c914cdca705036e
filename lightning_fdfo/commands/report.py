"""The command `lightning-fdfo report RUN_DIR`: one page about a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import write_text
from lightning_fdfo.report.page import render_page
from lightning_fdfo.report.run_files import RunFiles

GENERATOR = 'name="generator" content="lightning-fdfo report"'
"""What every report has near its head, by which one may be written anew."""


def main(arguments: Sequence[str]) -> None:
    """Runs `lightning-fdfo report …`; raises ConfigurationError for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="lightning-fdfo report", description="Writes one HTML page about a run, which needs no network to be read."
    )
    parser.add_argument("folder", type=Path, help="of a run: its trainer.default_root_dir")
    parser.add_argument("--output", type=Path, help="default: report.html in that folder")
    options = parser.parse_args(arguments)
    path = write_report(options.folder, options.output)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Writes the report of a run's folder; an earlier report is written anew, another file is not.

    Args:
        folder: the run's.
        output: None for `report.html` in it.

    Returns:
        Where it is.

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
