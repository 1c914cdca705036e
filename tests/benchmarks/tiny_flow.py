"""What is timed: a small SD3 transformer of random weights as a flow, and a run of it as a user has it."""

from __future__ import annotations

import io
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from lightning_fdfo import Batching, Evaluation, FDFOModule, FlowModel, LoRA, Objective, PromptDataModule, Sampling
from lightning_fdfo.callbacks import EpochProgress, PairLog
from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.files import write_text
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.registry import JOINT_ATTENTION
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.schedules import uniform_sigmas
from tests.conftest import brightness
from tests.flows.tiny_models import random_weights

TOKENS, POOLED, CHANNELS = 16, 64, 16
NEVER = 10**6
"""Epochs: the drift is measured in the first one alone, which no benchmark counts."""
PROMPTS = ("a cat", "the dog", "some bird", "one fish", "five trees")


@dataclass(frozen=True)
class Sizes:
    """Of a model, its latents and an epoch."""

    layers: int = 2
    width: int = 64
    side: int = 16
    pairs: int = 8
    steps: int = 10
    points: int = 4
    batch_size: int = 32
    rollout_batch_size: int = 48
    churn: float = 0.05
    rank: int = 32
    alpha: int = 64
    lr: float = 1e-3
    clip_range: float = 0.03


def make_transformer(sizes: Sizes) -> SD3Transformer2DModel:
    """Random weights, the same each time; frozen."""
    transformer = SD3Transformer2DModel(
        sample_size=sizes.side,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=sizes.layers,
        attention_head_dim=32,
        num_attention_heads=sizes.width // 32,
        joint_attention_dim=sizes.width,
        caption_projection_dim=sizes.width,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=sizes.side // 2,
    )
    return random_weights(transformer).requires_grad_(False).eval()


def embed(text: str, width: int) -> tuple[Tensor, Tensor]:
    """What a prompt is conditioned on: [16, width] and [64], a function of its letters."""
    generator = torch.Generator().manual_seed(int.from_bytes(text.encode()[:7], "big"))
    return torch.randn(TOKENS, width, generator=generator), torch.randn(POOLED, generator=generator)


class TinyFlow(FlowModel):
    """An SD3 transformer between texts and pictures that cost next to nothing."""

    lora_targets = JOINT_ATTENTION

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    def validate(self) -> None: ...

    def load(self) -> None:
        self.transformer = make_transformer(self.sizes)

    def to_device(self, device: torch.device) -> None: ...

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> Conditioning:
        texts, pooled = zip(*(embed(prompt, self.sizes.width) for prompt in prompts), strict=True)
        return Conditioning({"texts": torch.stack(texts), "pooled": torch.stack(pooled)})

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (CHANNELS, self.sizes.side, self.sizes.side)

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        return uniform_sigmas(num_steps)

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=1000 * sigma.expand(len(latents)),
            encoder_hidden_states=conditioning.tensors["texts"],
            pooled_projections=conditioning.tensors["pooled"],
            return_dict=False,
        )[0]
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].sigmoid()


def make_module(sizes: Sizes) -> FDFOModule:
    """The quick start's settings, with this flow and a reward that costs nothing."""
    return FDFOModule(
        TinyFlow(sizes),
        {"brightness": RewardTerm(brightness)},
        Sampling(num_steps=sizes.steps, height=sizes.side, width=sizes.side, churn=sizes.churn),
        Batching(sizes.pairs, 1, sizes.points, sizes.batch_size, sizes.rollout_batch_size),
        Objective(clip_range=sizes.clip_range, normalization="root_mean_square"),
        LoRA(rank=sizes.rank, alpha=sizes.alpha),
        partial(torch.optim.AdamW, lr=sizes.lr, weight_decay=1e-4),
        evaluation=Evaluation(drift_every=NEVER),
    )


def fit(module: FDFOModule, epochs: int, folder: Path, *callbacks: Callback) -> None:
    """A run with what a user's has: guards, last.ckpt, loggers, the pairs' table, and the bar; but no pictures."""
    prompts = folder / "prompts.txt"
    write_text(prompts, "\n".join(PROMPTS) + "\n")
    checkpoints = ModelCheckpoint(
        folder / "checkpoints", "{epoch}", every_n_epochs=10, save_on_train_epoch_end=True, save_top_k=-1
    )
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        enable_model_summary=False,
        plugins=[SafeCheckpointIO()],
        logger=[TensorBoardLogger(folder, name="", version=""), CSVLogger(folder, "csv", flush_logs_every_n_steps=1)],
        callbacks=[*callbacks, checkpoints, EpochProgress(), PairLog()],
    )
    trainer.fit(module, PromptDataModule(str(prompts)))


@contextmanager
def quiet() -> Iterator[None]:
    """What runs print goes nowhere, unless they fail."""
    said = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with redirect_stdout(said), redirect_stderr(said):
            yield
    except BaseException:
        print(said.getvalue(), file=sys.stderr)
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class EpochClock(Callback):
    """Seconds of each epoch, from its start to the start of the next: hooks of its end, and checkpoints, included.

    The first is not counted: libraries set up in it what they keep.

    Args:
        file: where the first process writes them when the run ends, a number a line.
    """

    def __init__(self, file: str | None = None) -> None:
        self.file = file
        self.starts: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """Of each counted epoch."""
        return [end - start for start, end in itertools.pairwise(self.starts[1:])]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.starts.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.starts.append(time.perf_counter())
        if self.file is not None and trainer.is_global_zero:
            write_text(self.file, "\n".join(map(str, self.seconds)))
