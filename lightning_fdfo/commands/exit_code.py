"""From an error to what is printed and the exit code: the one place, for all commands.

An error that somebody can mend is one line. What is not registered here is a bug, and keeps its traceback. A module
that imports a heavy library registers that library's errors by itself, so that light commands stay light.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import singledispatch
from importlib.metadata import requires
from typing import NamedTuple, NoReturn, TypeVar

from lightning_fdfo.commands.author_lines import author_lines
from lightning_fdfo.errors import ConfigurationError, DivergenceError, RewardError

T = TypeVar("T")


class Told(NamedTuple):
    """What is said of an error."""

    text: str
    """For standard error; see `one_line`."""
    code: int = 2
    """Of the process: 2 for what the user can mend before a run, other numbers for what ended one; 3 for a reward."""
    by_all: bool = False
    """False if all processes raise it alike, and the first one tells it; True if perhaps one alone does."""


@singledispatch
def told(error: BaseException) -> Told | None:
    """What is said of an error instead of its traceback; None keeps the traceback.

    Another kind of error is a function more: `@told.register`.

    Example:
        >>> told(ConfigurationError("num_pairs: expected at least 1, got 0"))
        Told(text='error: num_pairs: expected at least 1, got 0', code=2, by_all=False)
        >>> told(KeyError("a bug")) is None
        True
    """
    return None


@told.register
def _configuration(error: ConfigurationError) -> Told:
    return Told(one_line(error))


@told.register
def _reward(error: RewardError) -> Told:
    lines = "".join(author_lines(error)).rstrip()
    text = f"{one_line(error)}\n{lines}" if lines else one_line(error)
    return Told(text, code=3, by_all=True)  # a reward may fail for one device's images


@told.register
def _divergence(error: DivergenceError) -> Told:
    return Told(one_line(error), code=1, by_all=True)  # one device's images alone may not be finite


@told.register
def _not_installed(error: ModuleNotFoundError) -> Told | None:
    """A dependency of ours that is missing; another module's import that fails may be a plugin's, or a bug."""
    missing = (error.name or "").partition(".")[0]
    package = {"PIL": "pillow", "yaml": "pyyaml"}.get(missing, missing.replace("_", "-"))
    needed = {re.split(r"[^\w.-]", line)[0] for line in requires("lightning-fdfo") or () if "extra ==" not in line}
    if package not in needed:
        return None
    return Told(f"error: {package} is not installed, and lightning-fdfo needs it: pip install {package}")


def one_line(error: object) -> str:
    r"""`error: …`, without the line breaks of what it quotes.

    Example:
        >>> one_line(ValueError("expected a, \n   got b"))
        'error: expected a, got b'
    """
    return f"error: {' '.join(str(error).split())}"


def run(command: Callable[[], T]) -> T:
    """Runs a command; an error that is `told` ends the process with its text and its code.

    Args:
        command: without arguments.

    Returns:
        What it gives.

    Raises:
        SystemExit: with the error's code.
    """
    try:
        return command()
    except KeyboardInterrupt:  # fit says more, see training/stop.py
        end(Told("interrupted", 130))
    except Exception as error:
        what = told(error)
        if what is None:
            raise
        end(what)


def end(what: Told) -> NoReturn:
    """Prints what is said, once for all processes, and ends this one."""
    if what.by_all or _is_first_process():
        print(what.text, file=sys.stderr)
    raise SystemExit(what.code)


def _is_first_process() -> bool:
    """Lightning knows; commands that have not imported it run in one process."""
    ranks = sys.modules.get("lightning_utilities.core.rank_zero")
    return getattr(getattr(ranks, "rank_zero_only", None), "rank", None) in (None, 0)
