"""What scores images: the contract of a reward, the registry, and the mixture that trains."""

from lightning_fdfo.hub import HubFiles
from lightning_fdfo.reward.base import BaseReward, Metadata, PairReward, Reward, Scorer
from lightning_fdfo.reward.function import FunctionReward, as_reward
from lightning_fdfo.reward.registry import available_rewards, load_reward, load_reward_class

__all__ = [
    "BaseReward",
    "FunctionReward",
    "HubFiles",
    "Metadata",
    "PairReward",
    "Reward",
    "Scorer",
    "as_reward",
    "available_rewards",
    "load_reward",
    "load_reward_class",
]
