"""What a run prints before its first number: one line per fact, and nothing from libraries."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
NOISE = re.compile(
    r"💡 Tip|(GPU|TPU) available: False|Seed set to|`Trainer.fit` stopped: `max_epochs|Restoring states from"
    r"|`weights_only` was not set"
)
"""Beginnings of Lightning's lines that say what the configuration says, or nothing of this run, or advertise."""
LOGGERS = (
    "fabric.utilities.rank_zero",
    "fabric.utilities.seed",
    "pytorch.trainer.connectors.checkpoint_connector",
    "pytorch.utilities.rank_zero",
)
"""Of Lightning, that say such lines."""
IRRELEVANT = (
    "Checkpoint directory .* exists and is not empty",  # that it goes on in a run's folder is meant
    "Experiment logs directory .* exists and is not empty",
    ".*does not have many workers.*",  # prompts are a list
)
"""Of Lightning's warnings."""


def quiet_libraries() -> None:
    """Takes the libraries' loading bars and hints from the console; warnings and errors stay.

    Progress of downloads stays where standard error is a terminal: it can take minutes.
    """
    import diffusers
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    for name in LOGGERS:
        logging.getLogger(f"lightning.{name}").addFilter(matters)
    warnings.formatwarning = _format_warning
    for message in IRRELEVANT:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning and torch, about them


_format_with_place = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package's as a line; one of another's with its place in the code."""
    if PACKAGE in Path(filename).parents:
        return f"warning: {message}\n"
    return _format_with_place(message, category, filename, lineno, line)


def matters(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's is worth a line on the console: a filter for its loggers."""
    return NOISE.match(record.getMessage()) is None
