"""The command `lightning-fdfo serve-reward NAME`: loads a reward, and answers RemoteRewards until it is stopped.

On the command line:

    lightning-fdfo serve-reward OCR --port 8765
    lightning-fdfo serve-reward HPSv2 --init_args '{version: "2.1"}' --device cuda
"""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import packages_distributions, version
from typing import Any

import uvicorn
import yaml

from lightning_fdfo.commands.rewards import Parser, parse_init_args
from lightning_fdfo.commands.score_folder import parse_device
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.remote.access import TOKEN_VARIABLE, is_loopback, read_token
from lightning_fdfo.remote.protocol import Limits
from lightning_fdfo.remote.server import RewardService, create_app, describe_reward
from lightning_fdfo.reward.base import Reward
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.registry import load_reward
from lightning_fdfo.reward.term import RewardTerm

LIMITS = Limits()
MAX_SHUTDOWN_SECONDS = 30


def main(arguments: Sequence[str]) -> int:
    """Runs `lightning-fdfo serve-reward …`.

    Returns:
        The exit code after Ctrl-C: 0.

    Raises:
        ConfigurationError, RewardError: see `serve`.
    """
    with suppress(KeyboardInterrupt):  # the server has shut down before it is raised again
        serve(_parser().parse_args(arguments))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightning-fdfo serve-reward",
        description="Serves a reward to RemoteRewards in other environments or on other machines. "
        f"The environment variable {TOKEN_VARIABLE} holds the token that they must have.",
    )
    parser.add_argument("name", help="a registered name, or a dotted path")
    parser.add_argument("--init_args", default="{}", help="options as YAML: '{version: \"2.0\"}'")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; any other needs a token")
    parser.add_argument("--port", type=int, default=8765, help="default: 8765; 0 takes a free one")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    for name, words in (("batch", "images"), ("pixels", "pixels of all images"), ("body", "bytes of images")):
        default = getattr(LIMITS, f"max_{name}")
        parser.add_argument(f"--max_{name}", type=int, default=default, help=f"{words} a request; default: {default}")
    parser.add_argument("--max_waiting", type=int, default=16, help="requests at once; default: 16")
    return parser


def serve(options: argparse.Namespace) -> None:
    """Serves until it is interrupted.

    Raises:
        ConfigurationError: options that cannot work; an address that others reach, without a token.
        RewardError: the reward cannot be set up.
    """
    token = read_token()
    if token is None and not is_loopback(options.host):
        raise ConfigurationError(
            f"--host {options.host}: others can reach it, and there is no token; make one, and set it on both sides: "
            f'export {TOKEN_VARIABLE}="$(openssl rand -hex 32)"'
        )
    if min(options.max_batch, options.max_pixels, options.max_body, options.max_waiting) < 1:
        raise ConfigurationError("--max_batch, --max_pixels, --max_body, --max_waiting: expected numbers above 0")
    limits = Limits(max_batch=options.max_batch, max_pixels=options.max_pixels, max_body=options.max_body)
    with bind(options.host, options.port) as listener:
        init_args = parse_init_args(options.init_args)
        reward = load_reward(options.name, **init_args)
        mix = RewardMix({options.name: RewardTerm(reward)})
        mix.fetch()
        mix.setup(parse_device(options.device))
        description = describe_reward(options.name, reward, limits, _configuration(reward, init_args))
        app = create_app(RewardService(mix, description, token, options.max_waiting))
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, http="h11", ws="none", lifespan="off",
            timeout_graceful_shutdown=MAX_SHUTDOWN_SECONDS,
        )  # fmt: skip
        _Server(config, _announcement(options.name, options.host, listener.getsockname()[1])).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, announcement: str) -> None:
        super().__init__(config)
        self.announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so."""
        await super().startup(sockets)
        print(self.announcement, flush=True)


def _announcement(name: str, host: str, port: int) -> str:
    """What is served, and the YAML to paste."""
    reachable = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    term = {"class_path": "lightning_fdfo.remote.RemoteReward", "init_args": {"url": url, "reward": name}}
    terms = {name.rpartition(".")[2]: {"reward": term, "weight": 1}}
    text = yaml.safe_dump(terms, default_flow_style=True, sort_keys=False, width=1000)
    return f"serving {name} at {url}, for model.rewards: {text.strip()[1:-1]}"


def _configuration(reward: Reward, init_args: Mapping[str, Any]) -> str:
    """Options, and the version of the distribution that the class comes from."""
    module = type(reward).__module__.partition(".")[0]
    versions = {name: version(name) for name in packages_distributions().get(module, [])}
    return json.dumps([init_args, versions], sort_keys=True, default=str)


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
