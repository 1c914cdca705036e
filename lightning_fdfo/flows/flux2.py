"""FLUX.2, klein and dev."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fdfo.flows.base import Guidance
from lightning_fdfo.flows.diffusers_flow import DiffusersFlow
from lightning_fdfo.flows.registry import JOINT_ATTENTION


class Flux2(DiffusersFlow):
    """Flux2KleinPipeline and Flux2Pipeline (dev): latents [128, H / 16, W / 16], each pixel a token.

    klein has classifier-free guidance, or none where it is distilled. dev has guidance embedded, which costs no second
    forward; its processor of texts wants torchvision. Texts fill all of `max_sequence_length` tokens, and all count.

    Source: https://github.com/black-forest-labs/flux2.
    """

    pipeline_classes = ("Flux2KleinPipeline", "Flux2Pipeline")
    sequence_length = 512
    sequence_range = (1, 8192)
    block_names = ("transformer_blocks", "single_transformer_blocks")
    patch_size = 1
    lora_targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out")

    @property
    def guidance(self) -> Guidance:
        """By the pipeline's class and what it was distilled on."""
        if self.source.index["_class_name"] == "Flux2Pipeline":
            return "embedded" if self.pipeline.transformer.config.guidance_embeds else "none"
        return "none" if self.pipeline.config.is_distilled else "classifier-free"

    @property
    def size_multiple(self) -> int:
        """Pixels a latent pixel: the VAE's factor, and its 2 x 2 patches."""
        return 2 * int(self.pipeline.vae_scale_factor)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(channels, height / f, width / f), where f is `size_multiple`."""
        channels, rows, columns = super().latent_shape(height, width)
        return (channels, rows // 2, columns // 2)

    def encode_texts(self, pipeline: Any, texts: list[str], device: torch.device, negative: bool) -> Mapping[str, Any]:
        """Three layers of Qwen3 (klein) or Mistral 3 (dev) side by side."""
        embeds, _ = pipeline.encode_prompt(prompt=texts, max_sequence_length=self.max_sequence_length, device=device)
        return {"prompt_embeds": embeds}

    def grid(self, num_steps: int, num_tokens: int) -> dict[str, Any]:
        """The shift follows the number of tokens and of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # the pipeline: only where it is used

        return {
            "sigmas": np.linspace(1.0, 1 / num_steps, num_steps),
            "mu": compute_empirical_mu(num_tokens, num_steps),
        }

    def predict(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor], guidance_scale: float) -> Tensor:
        """At timestep sigma; a position is (0, row, column, 0) of a pixel, (0, 0, 0, place) of a word."""
        _, _, height, width = latents.shape
        text = tensors["prompt_embeds"]
        guidance = torch.full_like(sigma, guidance_scale) if self.guidance == "embedded" else None
        tokens: Tensor = self.transformer(
            hidden_states=latents.flatten(2).transpose(1, 2),
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=_positions(1, 1, text.shape[1]).to(latents.device),
            img_ids=_positions(height, width, 1).to(latents.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).reshape(latents.shape)

    def unscale(self, latents: Tensor) -> Tensor:
        """By the mean and deviation that the VAE's batch norm has seen, then patches to pixels."""
        norm, eps = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        mean, variance = (values.float()[:, None, None] for values in (norm.running_mean, norm.running_var))
        return F.pixel_shuffle(latents * (variance + eps).sqrt() + mean, 2)

    def pipeline_call(self, guidance_scale: float, negative_prompts: list[str] | None) -> dict[str, Any]:
        """With negative prompts encoded, as klein takes them."""
        call = {"guidance_scale": guidance_scale, "max_sequence_length": self.max_sequence_length}
        if negative_prompts is None or self.guidance != "classifier-free":
            return call
        with self.encoding():
            tensors = self.text_encoding.encode(negative_prompts, negative=True)
        return {**call, "negative_prompt_embeds": tensors["prompt_embeds"]}


def _positions(rows: int, columns: int, places: int) -> Tensor:
    """[rows columns places, 4]."""
    return torch.cartesian_prod(*(torch.arange(length, dtype=torch.float32) for length in (1, rows, columns, places)))
