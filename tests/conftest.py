"""What several tests share: a flow model of a few numbers, and a trainer that runs it in a second."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_fdfo import (
    Batching,
    Evaluation,
    FailurePolicy,
    FDFOModule,
    FlowModel,
    LoRA,
    Objective,
    PromptDataModule,
    Sampling,
)
from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.schedules import uniform_sigmas


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers, alone and among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class ToyTransformer(nn.Module, PeftAdapterMixin):
    """A velocity that is a small network of latents, sigma and conditioning."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(12 + 1 + 2, 32), nn.Linear(32, 12)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)

    def forward(self, latents: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        features = torch.cat([latents.flatten(1), sigma.expand(len(latents), 1), embeds], dim=1)
        return latents + self.second(torch.tanh(self.first(features))).view_as(latents)


class ToyFlow(FlowModel):
    """Latents are images of 2 x 2 pixels; a prompt's conditioning is its length and its first letter."""

    lora_targets = ("first", "second")

    def validate(self) -> None: ...

    def load(self) -> None:
        self.transformer = ToyTransformer().requires_grad_(False).eval()

    def to_device(self, device: torch.device) -> None: ...

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> Conditioning:
        return Conditioning({"embeds": torch.tensor([[len(p) / 10, ord(p[0]) / 100] for p in prompts])})

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (3, 2, 2)

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        return uniform_sigmas(num_steps)

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        sigma = sigma.reshape(-1, 1).expand(len(latents), 1)
        return self.transformer(latents, sigma, conditioning.tensors["embeds"])

    def decode(self, latents: Tensor) -> Tensor:
        return latents.sigmoid()


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    """A reward with a gradient that everybody knows."""
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\nthe dog\nsome bird\none fish\nfive trees\n", encoding="utf-8")
    return path


TOY_GROUPS: dict[str, Any] = {
    "batching": Batching(num_pairs=16, updates_per_epoch=2, batch_size=32),
    "failures": FailurePolicy(),
    "evaluation": Evaluation(),
}


@pytest.fixture
def toy_module() -> Callable[..., FDFOModule]:
    """Builds a module on the toy flow; keyword arguments replace the defaults, also those of a group's fields."""

    def build(**options: Any) -> FDFOModule:
        groups = {}
        for name, group in TOY_GROUPS.items():
            own = {field.name: options.pop(field.name) for field in fields(group) if field.name in options}
            groups[name] = replace(group, **own)
        settings: dict[str, Any] = {
            "flow": ToyFlow(),
            "rewards": {"brightness": RewardTerm(brightness)},
            "sampling": Sampling(num_steps=4, height=2, width=2, churn=0.1),
            "objective": Objective(normalization="root_mean_square"),
            "lora": LoRA(rank=2, alpha=4),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        }
        return FDFOModule(**(settings | groups | options))

    return build


@pytest.fixture
def fit(tmp_path: Path, prompts_file: Path) -> Callable[..., Trainer]:
    """Trains a module for some epochs and returns the trainer."""

    def run(module: FDFOModule, epochs: int, ckpt_path: str | None = None, **options: Any) -> Trainer:
        settings: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "devices": 1,
            "gradient_clip_val": 1.0,
            "default_root_dir": tmp_path,
            "plugins": [SafeCheckpointIO()],
        }
        train, val = options.pop("train", str(prompts_file)), options.pop("val", None)
        trainer = Trainer(max_epochs=epochs, **(settings | options))
        trainer.fit(module, PromptDataModule(train, val), ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def judge(tmp_path: Path, prompts_file: Path) -> Callable[..., Any]:
    """Runs `test`, `predict` or `validate` on the five prompts and returns what the trainer gives."""

    def run(module: FDFOModule, command: str = "test", ckpt_path: str | None = None, **options: Any) -> Any:
        settings: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "plugins": [SafeCheckpointIO()],
        }
        images = options.pop("images_per_prompt", 3)
        data = PromptDataModule("", str(prompts_file), val_batch_size=4, images_per_prompt=images)
        return getattr(Trainer(**(settings | options)), command)(module, data, ckpt_path=ckpt_path)

    return run


def trainable(module: FDFOModule) -> dict[str, Tensor]:
    """A copy of what trains."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.fixture
def weights() -> Callable[[FDFOModule], dict[str, Tensor]]:
    return trainable
