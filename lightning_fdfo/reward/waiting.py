"""Waiting for a reward: reported after a minute, ended by a time limit.

Foreign code may never return. The run's threads that wait for it report so, and those that run it are daemons: none of
them keeps a process alive that wants to end.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

FIRST_REPORT = 60.0
"""Seconds until a wait is reported; each further report comes after twice the time."""
MAX_POLL = 1.0
"""Seconds between two looks at what is waited for."""

_LOGGER = logging.getLogger(__name__)
_waits: dict[int, _Wait] = {}
_never = threading.Event()
_watching_process: int | None = None


class _Wait:
    """Something that is waited for."""

    def __init__(self, what: Callable[[], str]) -> None:
        self.what = what
        self.start = time.monotonic()
        self.next_report = FIRST_REPORT

    def report(self) -> None:
        """Reports it, if that is due."""
        seconds = time.monotonic() - self.start
        if seconds >= self.next_report:
            self.next_report *= 2
            _LOGGER.warning("still waiting after %.3g s: %s", seconds, self.what())


@contextmanager
def reported(what: Callable[[], str]) -> Iterator[None]:
    """Reports what is waited for, in the log, if it takes longer than `FIRST_REPORT`.

    Args:
        what: gives it in words; called only if it is reported.
    """
    _start_watching()
    waiting = _Wait(what)
    _waits[id(waiting)] = waiting
    try:
        yield
    finally:
        del _waits[id(waiting)]


def _start_watching() -> None:
    """One thread a process looks at all waits: a thread a call would cost more than many a call."""
    global _watching_process
    if _watching_process != os.getpid():  # a forked process has none of its parent's threads
        _watching_process = os.getpid()
        threading.Thread(target=_watch, name="reward waits", daemon=True).start()


def _watch() -> None:
    while True:
        _never.wait(min(MAX_POLL, FIRST_REPORT / 4))
        _report_all()


def _report_all() -> None:
    """In a function of its own, so that the thread keeps no reward, and no weights of one, while it sleeps."""
    for waiting in list(_waits.values()):
        waiting.report()


def start(work: Callable[[], T]) -> Future[T]:
    """Runs `work` in a daemon thread of its own.

    Example:
        >>> start(lambda: 6 * 7).result()
        42
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever waits for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


class OverdueError(Exception):
    """A call did not end in time."""


class TimeLimit:
    """Ends the wait for a call after some seconds; the call itself cannot be ended, and its result is discarded.

    Calls never overlap: one that comes while an overdue call still runs waits for that first, within its own time.

    Args:
        seconds: > 0.

    Example:
        >>> TimeLimit(10.0)(lambda: "in time")
        'in time'
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._running: Future[Any] | None = None

    def __call__(self, work: Callable[[], T]) -> T:
        """What `work` returns.

        Raises:
            OverdueError: it, or an earlier call, did not end in time.
        """
        deadline = time.monotonic() + self.seconds
        if self._running is not None and not wait([self._running], self.seconds).done:
            raise OverdueError("an earlier call, which was overdue, still runs")
        future = start(work)
        self._running = future
        if not wait([future], max(0.0, deadline - time.monotonic())).done:
            raise OverdueError("no result")
        self._running = None
        return future.result()
