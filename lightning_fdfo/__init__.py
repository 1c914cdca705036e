"""Post-train text-to-image flow models with rewards: Finite Difference Flow Optimization on PyTorch Lightning."""

from lightning_fdfo.data import PromptDataModule
from lightning_fdfo.flow import FlowModel, LoRA
from lightning_fdfo.module import FDFOModule, Objective
from lightning_fdfo.reward import Reward, RewardMix
from lightning_fdfo.rollout import Sampling

__all__ = ["FDFOModule", "FlowModel", "LoRA", "Objective", "PromptDataModule", "Reward", "RewardMix", "Sampling"]
