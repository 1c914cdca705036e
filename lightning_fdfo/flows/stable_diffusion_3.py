"""Stable Diffusion 3 and 3.5, and every folder in the format of diffusers' StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_fdfo.flows.diffusers_flow import DiffusersFlow
from lightning_fdfo.flows.latents import dynamic_shift
from lightning_fdfo.flows.registry import JOINT_ATTENTION


class StableDiffusion3(DiffusersFlow):
    """StableDiffusion3Pipeline: classifier-free guidance, latents [16, H / 8, W / 8].

    Its `max_sequence_length` counts T5's tokens, 0 to 512. A pipeline without T5 pads the text with as many zero
    vectors; 0 leaves them out, as `tiny-digits` was trained.

    Example:
        >>> flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
        >>> flow.load()
        >>> flow.latent_shape(32, 64)
        (8, 8, 16)
        >>> flow.sigmas(4, 32, 64)[0].item()
        1.0

    Source: arXiv 2403.03206.
    """

    pipeline_classes = ("StableDiffusion3Pipeline",)
    sequence_length = 256
    sequence_range = (0, 512)
    lora_targets = JOINT_ATTENTION

    def encode_texts(self, pipeline: Any, texts: list[str], device: torch.device, negative: bool) -> Mapping[str, Any]:
        """Two CLIPs and T5 side by side, and the CLIPs' pooled vectors."""
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=texts,
            prompt_2=texts,
            prompt_3=texts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=device,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    @property
    def max_tokens_a_side(self) -> int | None:
        """Side of the table of positions."""
        return int(self.pipeline.transformer.config.pos_embed_max_size)

    def grid(self, num_steps: int, num_tokens: int) -> dict[str, Any]:
        """A number of steps, and the shift of a scheduler that has a dynamic one."""
        config = self.pipeline.scheduler.config
        dynamic = {"mu": dynamic_shift(config, num_tokens)} if config.get("use_dynamic_shifting") else {}
        return {"num_inference_steps": num_steps, **dynamic}

    def predict(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor], guidance_scale: float) -> Tensor:
        """At timestep 1000 sigma."""
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=1000 * sigma,
            encoder_hidden_states=tensors["prompt_embeds"],
            pooled_projections=tensors["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return velocity
