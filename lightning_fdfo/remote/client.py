"""The client's HTTP calls: with a time limit, and tried again where that may help."""

from __future__ import annotations

import json
import logging
import random
import time
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import httpx
import tenacity

from lightning_fdfo.remote.access import is_loopback, read_token
from lightning_fdfo.remote.protocol import CONTENT_TYPE

MAX_BACKOFF = 30.0
"""Seconds between two attempts, before the jitter."""
MAX_CONNECT = 10.0
"""Seconds until a connection stands."""
MAX_REPLY = 2**22
"""Bytes of an answer."""
CHUNK = 2**16

_JITTER = random.SystemRandom()  # nobody's seed: several processes that failed together must not come back together
_LOGGER = logging.getLogger(__name__)


class RemoteError(RuntimeError):
    """A server gave no scores. The message says which server, and what happened."""

    def __repr__(self) -> str:
        return str(self)


class _PassingError(RemoteError):
    """Worth another attempt: no connection, no answer in time, 429, or a fault of the server."""


class Answer(NamedTuple):
    """What a server said."""

    status: int
    body: bytes

    @property
    def detail(self) -> str:
        """Its message, on one line, of printable characters."""
        try:
            said = json.loads(self.body)["detail"]
        except (ValueError, KeyError, TypeError, RecursionError):
            said = self.body[:200].decode(errors="replace")
        words = "".join(character if character.isprintable() else " " for character in str(said)[:2000])
        return f"status {self.status}: {' '.join(words.split())}"


class Client:
    """Asks one server.

    Args:
        url: `http://HOST:PORT`.
        timeout: seconds for one call.
        attempts: how often a call is tried.
        backoff: seconds before the second attempt.
    """

    def __init__(self, url: str, timeout: float, attempts: int, backoff: float) -> None:
        self.url = url
        self.timeout = timeout
        self.attempts = attempts
        self.backoff = backoff
        direct = is_loopback(httpx.URL(url).host)  # no proxy of the environment's on the way to this machine
        limits = httpx.Timeout(timeout, connect=min(timeout, MAX_CONNECT))
        self._http = httpx.Client(base_url=url, timeout=limits, trust_env=not direct)
        weakref.finalize(self, self._http.close)

    def __reduce__(self) -> tuple[type[Client], tuple[str, float, int, float]]:
        """A copy has connections of its own."""
        return Client, (self.url, self.timeout, self.attempts, self.backoff)

    def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """One call, tried again while that may help; raises RemoteError after the last attempt."""
        wait = tenacity.wait_exponential(multiplier=self.backoff, max=MAX_BACKOFF)
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=lambda state: wait(state) * _JITTER.uniform(1.0, 1.5),
            retry=tenacity.retry_if_exception_type(_PassingError),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return retrying(self._ask_once, method, path, body)
        except _PassingError as error:
            raise RemoteError(f"{self.url}: no answer in {self.attempts} attempts, at last {error}") from error

    def _tell(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        wait = state.next_action.sleep if state.next_action is not None else 0.0
        _LOGGER.warning(
            "%s: attempt %d of %d: %s; the next in %.1f s",
            self.url, state.attempt_number, self.attempts, error, wait,
        )  # fmt: skip

    def _ask_once(self, method: str, path: str, body: bytes) -> Answer:
        token, deadline = read_token(), time.monotonic() + self.timeout
        headers = {"Content-Length": str(len(body)), "Content-Type": CONTENT_TYPE, "Accept-Encoding": "identity"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        reply = bytearray()
        try:
            with self._http.stream(method, path, content=_before(deadline, body), headers=headers) as response:
                for chunk in response.iter_raw():
                    reply += chunk
                    if len(reply) > MAX_REPLY:
                        raise RemoteError(f"{self.url}: expected an answer of at most {MAX_REPLY} bytes")
                    _in_time(deadline)
        except httpx.TimeoutException as error:
            raise _PassingError(f"{type(error).__name__} with timeout {self.timeout:g} s") from error
        except httpx.TransportError as error:
            raise _PassingError(f"{type(error).__name__}: {error}") from error
        answer = Answer(response.status_code, bytes(reply))
        if answer.status == 429 or answer.status >= 500:
            raise _PassingError(answer.detail)
        return answer


def _before(deadline: float, body: bytes) -> Iterator[bytes]:
    """A body in pieces, as long as there is time."""
    for start in range(0, len(body), CHUNK):
        _in_time(deadline)
        yield body[start : start + CHUNK]


def _in_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise httpx.ReadTimeout("the call took too long")
