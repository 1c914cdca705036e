"""The command `lightning-fdfo serve-reward NAME`: loads a reward, and answers RemoteRewards until it is stopped.

On the command line:

    lightning-fdfo serve-reward OCR --port 8765
    lightning-fdfo serve-reward HPSv2 --init_args '{version: "2.1"}' --device cuda
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import packages_distributions, version
from typing import Any

import yaml

from lightning_fdfo.commands.function_parser import run_function
from lightning_fdfo.commands.option_values import parse_device, parse_init_args
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.remote.access import TOKEN_VARIABLE, is_loopback, read_token
from lightning_fdfo.remote.listener import bind, reachable_url, run_server
from lightning_fdfo.remote.protocol import Description, Limits
from lightning_fdfo.remote.server import RewardService, create_app, describe_reward
from lightning_fdfo.reward.base import BaseReward
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.registry import load_reward
from lightning_fdfo.reward.term import RewardTerm

LIMITS = Limits()


def main(arguments: Sequence[str]) -> int:
    """Runs `lightning-fdfo serve-reward …`.

    Returns:
        The exit code after Ctrl-C: 0.

    Raises:
        ConfigurationError, RewardError: see `serve`.
    """
    with suppress(KeyboardInterrupt):  # the server has shut down before it is raised again
        run_function(serve, "lightning-fdfo serve-reward", arguments)
    return 0


def serve(
    name: str,
    init_args: str = "{}",
    host: str = "127.0.0.1",
    port: int = 8765,
    device: str = "cpu",
    max_batch: int = LIMITS.max_batch,
    max_pixels: int = LIMITS.max_pixels,
    max_body: int = LIMITS.max_body,
    max_waiting: int = 16,
) -> None:
    """Serves a reward to RemoteRewards in other environments or on other machines.

    The environment variable LIGHTNING_FDFO_TOKEN holds the token that they must have.

    Args:
        name: a registered name, or a dotted path
        init_args: options as YAML: '{version: "2.0"}'
        host: where it listens; any other than the default needs a token
        port: 0 takes a free one
        device: of the reward
        max_batch: images a request
        max_pixels: pixels of all images a request
        max_body: bytes of images a request
        max_waiting: requests at once

    Raises:
        ConfigurationError: options that cannot work; an address that others reach, without a token.
        RewardError: the reward cannot be set up.
    """
    token = read_token()
    if token is None and not is_loopback(host):
        raise ConfigurationError(
            f"--host {host}: others can reach it, and there is no token; make one, and set it on both sides: "
            f'export {TOKEN_VARIABLE}="$(openssl rand -hex 32)"'
        )
    if min(max_batch, max_pixels, max_body, max_waiting) < 1:
        raise ConfigurationError("--max_batch, --max_pixels, --max_body, --max_waiting: expected numbers above 0")
    limits = Limits(max_batch=max_batch, max_pixels=max_pixels, max_body=max_body)
    options = parse_init_args(init_args)
    with bind(host, port) as listener:
        mix = load_mix(name, options, device)
        description = describe_reward(name, mix.rewards[name], limits, _configuration(mix.rewards[name], options))
        app = create_app(RewardService(mix, description, token, max_waiting))
        run_server(app, listener, _announcement(description, host, listener.getsockname()[1]))


def load_mix(name: str, options: Mapping[str, Any], device: str) -> RewardMix:
    """A mixture of one reward, set up on a device; raises as `serve` does."""
    mix = RewardMix({name: RewardTerm(load_reward(name, **options))})
    mix.fetch()
    mix.setup(parse_device(device))
    return mix


def _announcement(description: Description, host: str, port: int) -> str:
    """What is served, and the YAML to paste."""
    url = reachable_url(host, port)
    name, kind = description.reward, "RemotePairReward" if description.compares else "RemoteReward"
    term = {"class_path": f"lightning_fdfo.remote.{kind}", "init_args": {"url": url, "reward": name}}
    terms = {name.rpartition(".")[2]: {"reward": term, "weight": 1}}
    text = yaml.safe_dump(terms, default_flow_style=True, sort_keys=False, width=1000)
    return f"serving {name} at {url}, for model.rewards: {text.strip()[1:-1]}"


def _configuration(reward: BaseReward, init_args: Mapping[str, Any]) -> str:
    """Options, and the version of the distribution that the class comes from."""
    module = type(reward).__module__.partition(".")[0]
    versions = {name: version(name) for name in packages_distributions().get(module, [])}
    return json.dumps([init_args, versions], sort_keys=True, default=str)
