"""The help of Lightning's commands, kept in files: the parser itself needs seconds of imports to print it.

    python -m lightning_fdfo.commands.kept_help    # writes assets/help/ anew, by the parser

A kept text is shown for exactly `lightning-fdfo fit --help` (or `-h`), and only where the versions of what it describes
are those that it was made with; otherwise the parser prints its own. A test holds each text to the parser's.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "assets" / "help"
MADE_WITH = "made_with.json"
"""In it: versions of `DESCRIBED`, and of Python, which lays lines out but adds no option."""

COMMANDS = ("fit", "validate", "test", "predict")
DESCRIBED = ("jsonargparse", "lightning", "lightning-fdfo", "torch")
"""Distributions whose options, classes and defaults are in a text."""


def find(words: Sequence[str]) -> str | None:
    """The kept text that a command line asks for; None if the parser must be asked.

    Args:
        words: of the command line, without the program.

    Example:
        >>> find(["fit", "--config", "mine.yaml", "--help"]) is None
        True
    """
    if len(words) != 2 or words[0] not in COMMANDS or words[1] not in ("-h", "--help"):
        return None
    if any(name.startswith("JSONARGPARSE_") for name in os.environ):  # these change what the parser prints
        return None
    made_with = json.loads((FOLDER / MADE_WITH).read_text(encoding="utf-8"))
    if any(made_with[name] != installed for name, installed in versions().items()):
        return None
    return (FOLDER / f"{words[0]}.txt").read_text(encoding="utf-8")


def versions() -> dict[str, str | None]:
    """The installed versions of `DESCRIBED`, without a build's label as in 2.13.0+cpu; None: not installed."""
    found: dict[str, str | None] = dict.fromkeys(DESCRIBED)
    for name in DESCRIBED:
        with suppress(PackageNotFoundError):
            found[name] = version(name).partition("+")[0]
    return found


def write(folder: Path = FOLDER) -> None:
    """Writes all texts by the parser, 80 columns wide, and the versions that they are made with."""
    from lightning_fdfo.commands import cli

    os.environ["COLUMNS"] = "80"
    for command in COMMANDS:
        sys.argv = ["lightning-fdfo", command, "--help"]
        with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
            cli.main()
        (folder / f"{command}.txt").write_text(printed.getvalue(), encoding="utf-8")
    made_with = {"python": f"{sys.version_info.major}.{sys.version_info.minor}", **versions()}
    (folder / MADE_WITH).write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
