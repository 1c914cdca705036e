"""From an error to what is printed and the exit code, for all commands.

An error that somebody can fix is one line. What is not registered here is a bug, and keeps its traceback. A module
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


class ErrorReport(NamedTuple):
    """What is printed of an error, and how the process ends."""

    text: str
    """For standard error; see `one_line`."""
    code: int = 2
    """Of the process: 2 for what the user can fix before a run, other numbers for what ended one; 3 for a reward."""
    from_every_process: bool = False
    """True if perhaps one process alone has failed; False if all fail alike, and the first one speaks for them."""


@singledispatch
def error_report(error: BaseException) -> ErrorReport | None:
    """What is printed of an error instead of its traceback; None keeps the traceback.

    Another kind of error is another function: `@error_report.register`.

    Example:
        >>> error_report(ConfigurationError("num_pairs: expected at least 1, got 0"))
        ErrorReport(text='error: num_pairs: expected at least 1, got 0', code=2, from_every_process=False)
        >>> error_report(KeyError("a bug")) is None
        True
    """
    return None


@error_report.register
def _configuration(error: ConfigurationError) -> ErrorReport:
    return ErrorReport(one_line(error))


@error_report.register
def _reward(error: RewardError) -> ErrorReport:
    lines = "".join(author_lines(error)).rstrip()
    text = f"{one_line(error)}\n{lines}" if lines else one_line(error)
    return ErrorReport(text, code=3, from_every_process=True)  # a reward may fail for one device's images


@error_report.register
def _divergence(error: DivergenceError) -> ErrorReport:
    return ErrorReport(one_line(error), code=1, from_every_process=True)  # one device's images alone may not be finite


@error_report.register
def _not_installed(error: ModuleNotFoundError) -> ErrorReport | None:
    """A dependency of ours that is missing; another module's import that fails may be a plugin's, or a bug."""
    missing = (error.name or "").partition(".")[0]
    package = {"PIL": "pillow", "yaml": "pyyaml"}.get(missing, missing.replace("_", "-"))
    needed = {re.split(r"[^\w.-]", line)[0] for line in requires("lightning-fdfo") or () if "extra ==" not in line}
    if package not in needed:
        return None
    return ErrorReport(f"error: {package} is not installed, and lightning-fdfo needs it: pip install {package}")


def one_line(error: object) -> str:
    r"""`error: …`, without the line breaks of what it quotes.

    Example:
        >>> one_line(ValueError("expected a, \n   got b"))
        'error: expected a, got b'
    """
    return f"error: {' '.join(str(error).split())}"


def run(command: Callable[[], T]) -> T:
    """Runs a command; an error that has a report ends the process with its text and its code.

    Args:
        command: without arguments.

    Returns:
        What it gives.

    Raises:
        SystemExit: with the error's code.
    """
    try:
        return command()
    except KeyboardInterrupt:  # fit says more, see guards/stop.py
        end(ErrorReport("interrupted", 130))
    except Exception as error:
        report = error_report(error)
        if report is None:
            raise
        end(report)


def end(report: ErrorReport) -> NoReturn:
    """Prints a report, once for all processes that fail alike, and ends this one."""
    if report.from_every_process or _prints():
        print(report.text, file=sys.stderr)
    raise SystemExit(report.code)


def _prints() -> bool:
    """Whether this process prints for all, also before they are connected: Lightning's rank says so, if it is there."""
    lightning = sys.modules.get("lightning_utilities.core.rank_zero")
    return getattr(getattr(lightning, "rank_zero_only", None), "rank", None) in (None, 0)
