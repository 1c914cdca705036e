"""Post-train text-to-image flow models with rewards: Finite Difference Flow Optimization on PyTorch Lightning.

Public names are imported when they are first used, so that a reward's `from lightning_fdfo import Reward` does not
import Lightning and diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_fdfo.data import PromptDataModule
    from lightning_fdfo.flow import FlowModel
    from lightning_fdfo.lora import LoRA
    from lightning_fdfo.module import FDFOModule, Objective
    from lightning_fdfo.reward import Reward
    from lightning_fdfo.reward_mix import RewardMix
    from lightning_fdfo.rollout import Sampling

__all__ = ["FDFOModule", "FlowModel", "LoRA", "Objective", "PromptDataModule", "Reward", "RewardMix", "Sampling"]

_ROOMS = {
    "FDFOModule": "module",
    "FlowModel": "flow",
    "LoRA": "lora",
    "Objective": "module",
    "PromptDataModule": "data",
    "Reward": "reward",
    "RewardMix": "reward_mix",
    "Sampling": "rollout",
}


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
