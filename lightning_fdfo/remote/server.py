"""The server behind RemoteReward: one reward, scored for whoever may ask, one batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.remote.access import TOKEN_VARIABLE, is_authorized, is_loopback, named_host
from lightning_fdfo.remote.codec import decode_request
from lightning_fdfo.remote.protocol import (
    CONTENT_TYPE,
    MAX_HEADER,
    Description,
    Limits,
    Prompts,
    RefusalError,
    Scores,
    parse_prompts,
)
from lightning_fdfo.reward.base import BaseReward, PairReward
from lightning_fdfo.reward.mix import RewardMix

MAX_UPLOAD_SECONDS = 300.0
"""Until a body must be here."""

Result = TypeVar("Result")


def describe_reward(name: str, reward: BaseReward, limits: Limits, configuration: str = "") -> Description:
    """What a server says of its reward.

    Args:
        name: what it is called: its registered name or dotted path.
        reward: an instance.
        limits: of a request.
        configuration: options and versions, in any words: another one is another reward.
    """
    low, high = reward.range
    facts = (name, configuration, low, high, reward.higher_is_better, *reward.required_metadata)
    return Description(
        reward=name,
        range=(low, high),
        higher_is_better=reward.higher_is_better,
        required_metadata=tuple(reward.required_metadata),
        compares=isinstance(reward, PairReward),
        checks_prompts=type(reward).check is not BaseReward.check,
        limits=limits,
        fingerprint=hashlib.sha256(repr(facts).encode()).hexdigest(),
    )


class RewardService:
    """A mixture of one reward, and the queue before it.

    Args:
        mix: of a single term, set up.
        description: of it.
        token: that each request must carry; None lets in whoever addresses this machine by a loopback name.
        max_waiting: requests that may be here at once, one of them being scored; each holds at most a body's bytes.
    """

    def __init__(self, mix: RewardMix, description: Description, token: str | None, max_waiting: int = 16) -> None:
        self.mix = mix
        self.description = description
        self.max_waiting = max_waiting
        self._token = token
        self._waiting = 0
        self._turn = anyio.Lock()

    def admit(self, request: Request) -> None:
        """Raises HTTPException for whoever may not ask; before a body is read."""
        if self._token is None:
            if not is_loopback(named_host(request.headers.get("host"))):  # a web page whose name was made to lead here
                raise HTTPException(403, "expected to be addressed as 127.0.0.1 or localhost: this server has no token")
        elif not is_authorized(request.headers.get("authorization"), self._token):
            raise HTTPException(
                401, f"expected the server's bearer token: set {TOKEN_VARIABLE}", {"WWW-Authenticate": "Bearer"}
            )

    def describe(self) -> Response:
        """GET /reward."""
        return _json(self.description.model_dump_json())

    async def check(self, request: Request) -> Response:
        """POST /check: whether the reward can score these prompts."""
        async with self._place():
            body = await _read(request, MAX_HEADER)
            await self._in_turn(request, lambda: self._check(body))
        return _json("{}")

    async def score(self, request: Request) -> Response:
        """POST /scores."""
        async with self._place():
            body = await _read(request, 8 + MAX_HEADER + self.description.limits.max_body)
            scores = await self._in_turn(request, lambda: self._score(body))
        return _json(scores.model_dump_json())

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self._waiting >= self.max_waiting:
            raise HTTPException(
                503, f"{self._waiting} requests are here already: ask again later", {"Retry-After": "1"}
            )
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def _in_turn(self, request: Request, work: Callable[[], Result]) -> Result:
        """Runs the work in a thread, after all that came before it; nothing runs for who has hung up."""
        await request.is_disconnected()  # reads on: otherwise nobody would notice who hangs up behind a large body
        async with self._turn:
            if await request.is_disconnected():
                raise HTTPException(499, "nobody waits for it any more")
            try:
                return await anyio.to_thread.run_sync(work)
            except RefusalError as refusal:
                raise HTTPException(refusal.status, str(refusal)) from refusal
            except (ConfigurationError, RewardError) as error:  # the same batch would fail again
                raise HTTPException(422, str(error)) from error

    def _check(self, body: bytes) -> None:
        request = parse_prompts(Prompts, body)
        self._compare(request)
        for prompt, metadata in zip(request.prompts, request.metadata, strict=True):
            self.mix.check(prompt, metadata)

    def _score(self, body: bytes) -> Scores:
        request, images = decode_request(body, self.description.limits)
        self._compare(request)
        if self.description.compares and len(images) % 2:
            raise RefusalError(400, f"{self.description.reward} compares two images: expected pairs, got {len(images)}")
        (scores,) = self.mix(images, request.prompts, request.metadata).values()
        return Scores(scores=scores.values.tolist())

    def _compare(self, request: Prompts) -> None:
        if request.fingerprint != self.description.fingerprint:
            raise RefusalError(
                409,
                f"this server's {self.description.reward} is not the reward that was asked for at first: "
                "it was started again with another one, other options or another version",
            )


def create_app(service: RewardService) -> FastAPI:
    """The service's three addresses, and no others."""

    async def admit(request: Request) -> None:
        service.admit(request)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(admit)])
    app.add_api_route("/reward", service.describe, methods=["GET"])
    app.add_api_route("/check", service.check, methods=["POST"])
    app.add_api_route("/scores", service.score, methods=["POST"])
    return app


async def _read(request: Request, most: int) -> bytes:
    """A body of at most `most` bytes, counted as they come."""
    if request.headers.get("content-type") != CONTENT_TYPE:
        raise HTTPException(415, f"expected the content type {CONTENT_TYPE}")
    body = bytearray()
    try:
        with anyio.fail_after(MAX_UPLOAD_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise HTTPException(413, f"expected a body of at most {most} bytes", {"Connection": "close"})
    except ClientDisconnect as error:
        raise HTTPException(499, "nobody waits for it any more") from error
    except TimeoutError as error:
        raise HTTPException(408, f"expected the body within {MAX_UPLOAD_SECONDS:g} seconds") from error
    return bytes(body)


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")
