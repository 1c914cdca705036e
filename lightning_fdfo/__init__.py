"""Post-train text-to-image flow models with rewards: Finite Difference Flow Optimization on PyTorch Lightning.

Public names are imported when they are first used, so that a reward's `from lightning_fdfo import Reward` does not
import Lightning and diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_fdfo.data import PromptDataModule
    from lightning_fdfo.flows.base import FlowModel
    from lightning_fdfo.flows.lora import LoRA
    from lightning_fdfo.module import FDFOModule
    from lightning_fdfo.reward.base import PairReward, Reward
    from lightning_fdfo.reward.mix import RewardMix
    from lightning_fdfo.settings import Batching, Evaluation, FailurePolicy, Objective, Sampling

__all__ = [
    "Batching",
    "Evaluation",
    "FDFOModule",
    "FailurePolicy",
    "FlowModel",
    "LoRA",
    "Objective",
    "PairReward",
    "PromptDataModule",
    "Reward",
    "RewardMix",
    "Sampling",
]

_LAZY = {
    "Batching": "settings",
    "Evaluation": "settings",
    "FDFOModule": "module",
    "FailurePolicy": "settings",
    "FlowModel": "flows.base",
    "LoRA": "flows.lora",
    "Objective": "settings",
    "PairReward": "reward.base",
    "PromptDataModule": "data",
    "Reward": "reward.base",
    "RewardMix": "reward.mix",
    "Sampling": "settings",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
