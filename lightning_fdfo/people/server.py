"""What the page asks the booth: a pair, its two images, a vote, an undo. Loopback, or a token in the link."""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, cast
from urllib.parse import urlsplit

import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, Field

from lightning_fdfo.people.booth import Booth, Side
from lightning_fdfo.people.round import Ballot, NotOnShowError
from lightning_fdfo.remote.access import is_loopback, named_host, read_token
from lightning_fdfo.remote.listener import bind, reachable_url

MAX_BODY = 4096
"""Bytes of a request."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' blob: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer: nothing is kept, and the page can ask nobody else."""

Rater = Annotated[str, Field(min_length=1, max_length=60), AfterValidator(lambda name: name.encode().decode())]
"""A name that can be written down: half of a surrogate pair cannot."""


class Who(BaseModel, extra="forbid", strict=True):
    """A rater."""

    rater: Rater


class VoteRequest(Who):
    """What a rater says of the pair that is on show."""

    ballot: str = Field(max_length=60)
    side: Side
    milliseconds: int = Field(ge=0, le=10**9)


class Door:
    """Who may come in.

    Args:
        token: that the link carries; None lets in whoever addresses this machine by a loopback name.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token

    def admit(self, request: Request, x_token: Annotated[str, Header()] = "") -> None:
        """Raises HTTPException for anybody else, and for what another site's page could send without asking."""
        if request.method == "POST" and request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "expected the content type application/json")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise HTTPException(403, "expected to be asked by this server's own page")
        if self._token is None:
            if not is_loopback(named_host(request.headers.get("host"))):  # a web page whose name was made to lead here
                raise HTTPException(403, "expected to be addressed as 127.0.0.1 or localhost: this server has no token")
            return
        given = x_token or request.query_params.get("token", "")
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            raise HTTPException(401, "expected the token that the link ends with")


class Page:
    """What the page asks, and what it is answered.

    Args:
        booth: where pairs wait.
        folder: the run's, whose reward curve the page shows while the model trains; None: it has none.
    """

    def __init__(self, booth: Booth, folder: Path | None) -> None:
        self.booth = booth
        self.folder = folder
        self._text = (files("lightning_fdfo.people") / "page.html").read_text(encoding="utf-8")

    def show(self) -> Response:
        """GET /: the page."""
        return Response(self._text, media_type="text/html")

    def next(self, who: Who) -> dict[str, object]:
        """POST /next: the pair to judge."""
        return self._answer(who.rater, self.booth.next(who.rater))

    def vote(self, given: VoteRequest) -> dict[str, object]:
        """POST /vote: takes a vote, and gives the next pair."""
        with _refusals():
            self.booth.vote(given.ballot, given.rater, given.side, given.milliseconds)
        return self._answer(given.rater, self.booth.next(given.rater))

    def undo(self, who: Who) -> dict[str, object]:
        """POST /undo: takes the last vote back, and gives its pair again."""
        with _refusals():
            return self._answer(who.rater, self.booth.undo(who.rater))

    def image(self, ballot: str, side: str) -> Response:
        """GET /images/BALLOT/SIDE.png; whoever knows the name may see it."""
        found = self.booth.image(ballot, side) if side in ("left", "right") else None
        if found is None:
            raise HTTPException(404, "no such image is on show")
        return Response(found, media_type="image/png")

    def curve(self) -> Response:
        """GET /curve.png."""
        file = None if self.folder is None else self.folder / "reward_curve.png"
        if file is None or not file.is_file():
            raise HTTPException(404, "there is no curve yet")
        return Response(file.read_bytes(), media_type="image/png")

    def _answer(self, rater: str, ballot: Ballot | None) -> dict[str, object]:
        """The pair to show, and what stands beside it."""
        shown = None if ballot is None else {"name": ballot.name, "prompt": ballot.pair.prompt}
        return {"ballot": shown, "status": self.booth.status(rater)._asdict()}


def create_app(booth: Booth, token: str | None, folder: Path | None) -> FastAPI:
    """The page's addresses, and no others; see `Page` and `Door` for the arguments."""
    app, page = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), Page(booth, folder)
    app.middleware("http")(_hardened)
    app.add_exception_handler(RequestValidationError, _invalid)
    admitted = [Depends(Door(token).admit)]
    app.add_api_route("/", page.show, methods=["GET"], dependencies=admitted)
    for path, answer in (("/next", page.next), ("/vote", page.vote), ("/undo", page.undo)):
        app.add_api_route(path, answer, methods=["POST"], dependencies=admitted)
    app.add_api_route("/images/{ballot}/{side}.png", page.image, methods=["GET"])
    app.add_api_route("/curve.png", page.curve, methods=["GET"], dependencies=admitted)
    return app


async def _invalid(request: Request, error: Exception) -> Response:
    """What came is not repeated: it may be no text."""
    where = {str(part) for problem in cast(RequestValidationError, error).errors() for part in problem["loc"][1:]}
    return JSONResponse({"detail": f"expected other values of {', '.join(sorted(where)) or 'JSON'}"}, 422)


async def _hardened(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    """Small requests alone, and headers on every answer."""
    size = request.headers.get("content-length", "0")
    if not size.isdecimal() or int(size) > MAX_BODY or "transfer-encoding" in request.headers:
        return Response(f"expected a body of at most {MAX_BODY} bytes", 413, {**HEADERS, "Connection": "close"})
    response = await answer(request)
    response.headers.update(HEADERS)
    return response


@contextmanager
def _refusals() -> Iterator[None]:
    """What the booth refuses is a conflict: the page asks for the next pair."""
    try:
        yield
    except NotOnShowError as error:
        raise HTTPException(409, str(error)) from error


def serve(booth: Booth, folder: Path, host: str, port: int) -> tuple[uvicorn.Server, str]:
    """Serves a booth's page from a thread.

    Args:
        booth: where pairs wait.
        folder: the run's.
        host: any other than a loopback address needs a token: the environment's, or a new one.
        port: 0 takes a free one.

    Returns:
        The server, which ends once its `should_exit` is true; and the link to the page.

    Raises:
        ConfigurationError: the address cannot be had, or the environment's token is none.
    """
    token = None if is_loopback(host) else read_token() or secrets.token_urlsafe(24)
    listener = bind(host, port)
    config = uvicorn.Config(
        create_app(booth, token, folder), log_level="warning", access_log=False, server_header=False, http="h11",
        ws="none", lifespan="off",
    )  # fmt: skip
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="people", daemon=True).start()
    link = f"{reachable_url(host, listener.getsockname()[1])}/"
    return server, link if token is None else f"{link}?token={token}"
