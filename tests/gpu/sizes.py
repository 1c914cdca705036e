"""What a case comes to before it runs: FLOPs and memory, counted on the meta device, where nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_fdfo.flows
from lightning_fdfo import LoRA
from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.lora import bind_lora
from lightning_fdfo.flows.quantization import BYTES
from lightning_fdfo.guards.memory import activation_bytes, training_state_bytes, weight_bytes
from tests.gpu.build import components, empty

CLIP_TOKENS = {"StableDiffusion3": 77, "Flux": 0}
"""Of a text, beside T5's `max_sequence_length`, that go through the blocks."""


@dataclass(frozen=True)
class Sizes:
    """What a model comes to.

    Args:
        weights: numbers of the transformer, with the tables that are stored beside its weights.
        lora: numbers that train.
        vae: its numbers.
        encoders: numbers of all text encoders.
        blocks: of the transformer.
        width: of a token.
        tokens: of an image and its text.
        forward: FLOPs of the velocity of one latent.
        training: FLOPs of one point, forward and backward, without what gradient checkpointing computes again.
    """

    weights: int
    lora: int
    vae: int
    encoders: int
    blocks: int
    width: int
    tokens: int
    forward: int
    training: int

    def memory(self, settings: Mapping[str, Any]) -> dict[str, int]:
        """Bytes on the device in training, by what takes them: the sum of docs/models.md, for a run's settings."""
        flow, points = settings["model"]["flow"]["init_args"], settings["model"]["batching"]["batch_size"]
        quantization, checkpointing = flow.get("quantization"), flow.get("gradient_checkpointing", False)
        return {
            "weights": weight_bytes(self.weights, BYTES[quantization] if quantization else 2),
            "LoRA": training_state_bytes(self.lora),
            "VAE": weight_bytes(self.vae, 2),
            "activations": activation_bytes(self.blocks, points, self.tokens, self.width, checkpointing=checkpointing),
        }

    def texts(self) -> int:
        """Bytes of the text encoders, which are on the device while texts are encoded."""
        return weight_bytes(self.encoders, 2)

    def epoch(self, settings: Mapping[str, Any]) -> dict[str, int]:
        """FLOPs of an epoch's velocities: those of the rollout, and those of training."""
        sampling, batching = settings["model"]["sampling"], settings["model"]["batching"]
        branch_steps = 2 * sampling["num_steps"]
        points = batching.get("num_points_per_pair") or branch_steps
        return {
            "rollout": batching["num_pairs"] * branch_steps * self.forward,
            "training": batching["num_pairs"] * points * self.training,
        }


def measure(
    model: str, folder: Path, settings: Mapping[str, Any], toy: bool = False, t5_layers: int | None = None
) -> Sizes:
    """Counts.

    Args:
        model: as in `components`.
        folder: the pipeline's, with weights or without.
        settings: of a run, resolved: family, image size, LoRA, tokens.
        toy: as in `components`.
        t5_layers: as in `components`.
    """
    given = settings["model"]
    family, options = given["flow"]["class_path"], given["flow"]["init_args"]
    flow: DiffusersFlow = getattr(lightning_fdfo.flows, family)(
        str(folder), max_sequence_length=options.get("max_sequence_length")
    )
    flow.transformer = flow.outline().requires_grad_(False)
    weights = count(flow.transformer)
    with torch.device("meta"):
        bind_lora(flow.transformer, LoRA(rank=given["lora"]["rank"]), flow.lora_targets, seed=0)
    height, width = given["sampling"]["height"], given["sampling"]["width"]
    config: Any = flow.transformer.config
    conditioning = Conditioning(
        {
            "prompt_embeds": _meta(1, CLIP_TOKENS[family] + flow.max_sequence_length, config["joint_attention_dim"]),
            "pooled_prompt_embeds": _meta(1, config["pooled_projection_dim"]),
        }
    )
    latents, sigma = _meta(1, *flow.latent_shape(height, width)), _meta(1)

    def velocity() -> Tensor:
        return flow.predict(latents, sigma, conditioning.tensors, given["sampling"].get("guidance_scale", 1.0))

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        velocity()
    with FlopCounterMode(display=False) as training:
        velocity().sum().backward()
    others = {name: part for name, part in components(model, toy, t5_layers).items() if name != "transformer"}
    return Sizes(
        weights=weights,
        lora=sum(parameter.numel() for parameter in flow.transformer.parameters() if parameter.requires_grad),
        vae=count(empty(*others["vae"])),
        encoders=sum(count(empty(*part)) for name, part in others.items() if name.startswith("text_encoder")),
        blocks=len(flow.blocks),
        width=flow.width,
        tokens=flow.num_tokens(height, width, conditioning),
        forward=forward.get_total_flops(),
        training=training.get_total_flops(),
    )


def count(module: nn.Module) -> int:
    """Numbers of a part of a pipeline, as it is stored."""
    return sum(tensor.numel() for tensor in {id(t): t for t in module.state_dict(keep_vars=True).values()}.values())


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
