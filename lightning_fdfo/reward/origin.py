"""Where a reward comes from, for messages and records: its distribution, its options, the command that checks it."""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
from importlib.metadata import EntryPoint
from typing import Any

import yaml

from lightning_fdfo.reward.base import BaseReward
from lightning_fdfo.reward.function import FunctionReward
from lightning_fdfo.reward.registry import available_rewards, distribution_name


def describe(reward: BaseReward) -> str:
    """A reward's class and the distribution that registers it, for messages; the module of one that none registers.

    Example:
        >>> from lightning_fdfo.reward.registry import load_reward
        >>> describe(load_reward("JPEGSize"))
        'JPEGSize of lightning-fdfo-rewards'
    """
    entry = _entry(reward)
    source = source_of(reward)
    module = getattr(source, "__module__", None) or type(source).__module__
    return f"{reward.name} of {f'the module {module}' if entry is None else distribution_name(entry)}"


def _entry(reward: BaseReward) -> EntryPoint | None:
    """The entry point that a reward was loaded by, or one that leads to its class; None if there is none."""
    kept = vars(reward).get("_entry")
    source = source_of(reward)
    value = f"{getattr(source, '__module__', None)}:{getattr(source, '__qualname__', None)}"
    return kept or next((entry for entry in available_rewards().values() if entry.value == value), None)


def check_command(reward: BaseReward) -> str:
    """The command that checks a reward, with its name or dotted path and the options that it was made with.

    Example:
        >>> from lightning_fdfo.reward.registry import load_reward
        >>> check_command(load_reward("JPEGSize", quality=80))
        "lightning-fdfo rewards check JPEGSize --init_args '{quality: 80}'"
    """
    entry = _entry(reward)
    name = _dotted_path(reward) if entry is None else entry.name
    if name is None:  # made in a script or a function, where no command finds it
        return "lightning_fdfo.testing.check_reward(...)"
    command, options = f"lightning-fdfo rewards check {name}", _options(reward)
    if not options:
        return command
    try:
        text = yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=10**6).strip()
    except yaml.YAMLError:
        return f"{command} --init_args …"
    return f"{command} --init_args {shlex.quote(text)}"


def source_of(reward: BaseReward) -> Any:
    """A reward's class, or the function that it calls.

    Example:
        >>> source_of(FunctionReward(brightest := lambda images, prompts, metadata: images)) is brightest
        True
    """
    if not isinstance(reward, FunctionReward):
        return type(reward)
    return reward.function.func if isinstance(reward.function, functools.partial) else reward.function


def made_with(reward: BaseReward) -> dict[str, Any]:
    """The options that a reward was made with, defaults among them; a copy's public attributes, for it knows no more.

    Example:
        >>> from lightning_fdfo.reward.registry import load_reward
        >>> made_with(load_reward("JPEGSize", quality=80))["quality"]
        80
    """
    if "_made_with" not in vars(reward):
        return reward.__getstate__()
    arguments, options = vars(reward)["_made_with"]
    if isinstance(reward, FunctionReward):
        return dict(options)
    parameters = inspect.signature(type(reward))
    defaults = {name: one.default for name, one in parameters.parameters.items() if one.default is not one.empty}
    return defaults | parameters.bind_partial(*arguments, **options).arguments


def _dotted_path(reward: BaseReward) -> str | None:
    """None if no path leads to it."""
    source = source_of(reward)
    module, name = getattr(source, "__module__", None) or "__main__", getattr(source, "__qualname__", "")
    loaded = sys.modules.get(module) if module != "__main__" else None
    return f"{module}.{name}" if loaded is not None and getattr(loaded, name, None) is source else None


def _options(reward: BaseReward) -> dict[str, Any]:
    """What it was made with, as far as that is not the default."""
    arguments, options = vars(reward).get("_made_with", ((), {}))  # not in a copy that was pickled
    if isinstance(reward, FunctionReward):
        return dict(options)
    signature = inspect.signature(type(reward))
    given = signature.bind_partial(*arguments, **options).arguments
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    return {name: value for name, value in given.items() if value is not defaults[name] and value != defaults[name]}
