"""A server in a thread of the test's process: it starts in milliseconds, and can be stopped and started anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import uvicorn

from lightning_fdfo.remote.listener import bind
from lightning_fdfo.remote.protocol import Limits
from lightning_fdfo.remote.server import RewardService, create_app, describe_reward
from lightning_fdfo.reward import BaseReward, load_reward
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.term import RewardTerm

TOKEN = "a-token-of-some-length"


class Server:
    """A reward, served."""

    def __init__(
        self, reward="JPEGSize", *, token=None, limits=None, port=0, name=None, configuration="", max_waiting=16
    ):
        self.reward = reward if isinstance(reward, BaseReward) else load_reward(reward)
        name = name or self.reward.name
        mix = RewardMix({name: RewardTerm(self.reward)})
        mix.setup(torch.device("cpu"))
        description = describe_reward(name, self.reward, limits or Limits(), configuration)
        self.service = RewardService(mix, description, token, max_waiting)
        self.listener = bind("127.0.0.1", port)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(create_app(self.service), log_level="warning", http="h11", ws="none", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_FDFO_TOKEN", raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts a server with `Server`'s arguments; stops it after the test."""
    servers = []

    def start(*args, **options):
        servers.append(Server(*args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
