"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fdfo.flows.diffusers_flow import DiffusersFlow
from lightning_fdfo.flows.latents import pack, unpack
from lightning_fdfo.flows.registry import JOINT_ATTENTION


class QwenImage(DiffusersFlow):
    """QwenImagePipeline: classifier-free guidance, latents [16, H / 8, W / 8], packed into tokens of 2 x 2.

    Guidance turns a token's velocity and leaves its length as it is, as in the pipeline, whose `true_cfg_scale` is
    `guidance_scale` here. `max_sequence_length` counts tokens behind the system's message, 1024 at most.

    Source: arXiv 2508.02324.
    """

    pipeline_classes = ("QwenImagePipeline",)
    sequence_length = 512
    sequence_range = (1, 1024)
    lora_targets = JOINT_ATTENTION

    @property
    def latent_channels(self) -> int:
        """Before packing."""
        return super().latent_channels // 4

    def load(self) -> None:
        """Loads, and ties the last block's text to its image."""
        if not self.is_loaded:
            super().load()
            self.blocks[-1].register_forward_hook(_tie)

    def encode_texts(self, pipeline: Any, texts: list[str], device: torch.device, negative: bool) -> Mapping[str, Any]:
        """Qwen2.5-VL's tokens and their mask."""
        embeds, mask = pipeline.encode_prompt(prompt=texts, max_sequence_length=self.max_sequence_length, device=device)
        if mask is None:  # the pipeline's way to say that all texts have the same length
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}

    def predict(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor], guidance_scale: float) -> Tensor:
        """At timestep sigma; without padding that no text needs, and without a mask if none needs any."""
        num_images, _, height, width = latents.shape
        mask = tensors["prompt_embeds_mask"]
        mask = mask[:, : int(mask.sum(1).max())]
        tokens: Tensor = self.transformer(
            hidden_states=pack(latents),
            timestep=sigma,
            encoder_hidden_states=tensors["prompt_embeds"][:, : mask.shape[1]],
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * num_images,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def guide(self, negative: Tensor, positive: Tensor, guidance_scale: float) -> Tensor:
        """Classifier-free guidance, token by token at the positive velocity's norm."""
        direction = F.normalize(pack(super().guide(negative, positive, guidance_scale)), dim=-1)
        norm = pack(positive).norm(dim=-1, keepdim=True)
        return unpack(direction * norm, *positive.shape[-2:])

    def unscale(self, latents: Tensor) -> Tensor:
        """Each channel at its mean and deviation, with the frames' axis of a VAE for videos: [N, C, 1, h, w]."""
        config = self.pipeline.vae.config
        mean, deviation = (
            latents.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std)
        )
        return (latents * deviation + mean)[:, :, None]

    def decode(self, latents: Tensor) -> Tensor:
        """The only frame."""
        return super().decode(latents)[:, :, 0]

    def pipeline_call(self, guidance_scale: float, negative_prompts: list[str] | None) -> dict[str, Any]:
        """The pipeline's own `guidance_scale` is for models that have it embedded: there are none."""
        return {
            "true_cfg_scale": guidance_scale,
            "negative_prompt": negative_prompts,
            "max_sequence_length": self.max_sequence_length,
        }

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        """Packed."""
        return pack(latents)


def _tie(block: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Adds nothing of the text to the image, so that all weights have gradients.

    What the last block makes of the text is dropped: its weights would have none, and DDP would wait for them.
    """
    text, image = outputs
    return text, image + 0 * text[:, :1]
