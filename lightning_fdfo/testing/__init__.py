"""Conformance checks for plugins: `check_reward` for a reward, `check_flow_model` for a model family.

Each is imported when it is first used: a reward's test needs no diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lightning_fdfo.testing.conformance import ConformanceError

if TYPE_CHECKING:
    from lightning_fdfo.testing.flow_checks import check_flow_model
    from lightning_fdfo.testing.reward_checks import check_reward

__all__ = ["ConformanceError", "check_flow_model", "check_reward"]

_LAZY = {"check_flow_model": "flow_checks", "check_reward": "reward_checks"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
