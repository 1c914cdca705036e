"""Binds an address before weights are loaded, and serves there until stopped."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from lightning_fdfo.errors import ConfigurationError

MAX_SHUTDOWN_SECONDS = 30
"""How long requests that are being answered may take once the server is stopped."""


def bind(host: str, port: int) -> socket.socket:
    """The address, taken before weights are loaded; nobody is listened to yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # TCP is named: otherwise asyncio leaves Nagle's delay on, 40 ms an answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigurationError(f"--host {host} --port {port}: {error}; choose another --port") from error
    return listener


def reachable_url(host: str, port: int) -> str:
    """The address of what listens at a host and port, as others reach it.

    Example:
        >>> reachable_url("127.0.0.1", 8765), reachable_url("::1", 8765)
        ('http://127.0.0.1:8765', 'http://[::1]:8765')
    """
    reachable = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def run_server(app: FastAPI, listener: socket.socket, announcement: str) -> None:
    """Answers requests until it is interrupted.

    Args:
        app: what answers them.
        listener: see `bind`.
        announcement: printed once the server listens.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, http="h11", ws="none", lifespan="off",
        timeout_graceful_shutdown=MAX_SHUTDOWN_SECONDS,
    )  # fmt: skip
    _Server(config, announcement).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, announcement: str) -> None:
        super().__init__(config)
        self.announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so."""
        await super().startup(sockets)
        print(self.announcement, flush=True)
