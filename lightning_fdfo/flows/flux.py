"""FLUX.1, dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_fdfo.flows.base import Guidance
from lightning_fdfo.flows.diffusers_flow import DiffusersFlow
from lightning_fdfo.flows.latents import pack, unpack
from lightning_fdfo.flows.registry import JOINT_ATTENTION


class Flux(DiffusersFlow):
    """FluxPipeline: latents [16, H / 8, W / 8], packed into tokens of 2 x 2.

    `dev` was distilled on guidance, which is an input: `guidance_scale` 3.5 is its own, and costs no second forward.
    `schnell` has none. T5 fills all of `max_sequence_length` tokens; `schnell` takes 256 at most.

    Source: https://github.com/black-forest-labs/flux.
    """

    pipeline_classes = ("FluxPipeline",)
    sequence_length = 512
    sequence_range = (1, 512)
    block_names = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = JOINT_ATTENTION

    @property
    def guidance(self) -> Guidance:
        """`embedded` for dev, `none` for schnell."""
        return "embedded" if self.pipeline.transformer.config.guidance_embeds else "none"

    @property
    def latent_channels(self) -> int:
        """Before packing."""
        return int(self.pipeline.transformer.config.in_channels) // 4

    def encode_texts(self, pipeline: Any, texts: list[str], device: torch.device, negative: bool) -> Mapping[str, Any]:
        """T5's tokens, and CLIP's pooled vector."""
        embeds, pooled, _ = pipeline.encode_prompt(
            prompt=texts, max_sequence_length=self.max_sequence_length, device=device
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor], guidance_scale: float) -> Tensor:
        """At timestep sigma; a token's position is (0, row, column), a word's is 0."""
        _, _, height, width = latents.shape
        axes = [torch.arange(length, dtype=torch.float32) for length in (1, height // 2, width // 2)]
        positions = torch.cartesian_prod(*axes).to(latents.device)
        guidance = torch.full_like(sigma, guidance_scale) if self.guidance == "embedded" else None
        tokens: Tensor = self.transformer(
            hidden_states=pack(latents),
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=tensors["prompt_embeds"],
            pooled_projections=tensors["pooled_prompt_embeds"],
            txt_ids=positions.new_zeros(tensors["prompt_embeds"].shape[1], 3),
            img_ids=positions,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def pipeline_call(self, guidance_scale: float, negative_prompts: list[str] | None) -> dict[str, Any]:
        """The pipeline's `guidance_scale` is the embedded one."""
        return {"guidance_scale": guidance_scale, "max_sequence_length": self.max_sequence_length}

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        """Packed."""
        return pack(latents)
