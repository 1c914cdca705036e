"""Runs conformance checks one after the other, and reports the result of each in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lightning_fdfo.errors import ConfigurationError, StoppedError

Check = tuple[Callable[[Any], str | None], bool]
"""From a sample to what is wrong; and whether the checks after it make no sense if it fails. Its docstring says what it
asks for."""


class ConformanceError(AssertionError):
    """A plugin breaks its contract; the message has a line for each check that failed."""


class Result(NamedTuple):
    """What one check found."""

    check: str
    """what is asked, in words"""
    problem: str | None
    """what came instead, and the hint; None if it passed"""


def examine(checks: Sequence[Check], sample: Any) -> Iterator[Result]:
    """Runs the checks one by one; those after a fatal one are left out."""
    for check, fatal in checks:
        question = str(check.__doc__).splitlines()[0].rstrip(".")
        question = question[0].lower() + question[1:]
        try:
            problem = check(sample)
        except (KeyboardInterrupt, StoppedError):
            raise
        except BaseException as error:  # a plugin is foreign code, which may even exit
            problem = str(error) if isinstance(error, ConfigurationError) else f"it raised {error!r}"
        yield Result(question, problem)
        if problem and fatal:
            return


def insist(name: str, results: Iterable[Result]) -> None:
    """Raises ConformanceError if a check has failed."""
    problems = [f"- {result.check}: {result.problem}" for result in results if result.problem]
    if problems:
        raise ConformanceError("\n".join([f"{name}:", *problems]))
