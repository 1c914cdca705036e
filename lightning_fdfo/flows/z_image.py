"""Z-Image, base and Turbo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_fdfo.flows.diffusers_flow import DiffusersFlow


class ZImage(DiffusersFlow):
    """ZImagePipeline: classifier-free guidance, latents [16, H / 8, W / 8].

    `guidance_scale` is the number on Z-Image's card plus one. The pipeline takes v + s * (v - v_negative), where s = 0
    is none; here as for every model it is v_negative + g * (v - v_negative), where g = 1 is none: g = s + 1.
    Turbo was distilled on guidance and has none, 1.0.

    Source: arXiv 2511.22699.
    """

    pipeline_classes = ("ZImagePipeline",)
    sequence_length = 512
    sequence_range = (1, 8192)
    block_names = ("noise_refiner", "context_refiner", "layers")
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    @property
    def width(self) -> int:
        """Numbers a token in the transformer."""
        config: Any = self.transformer.config
        return int(config.dim)

    def encode_texts(self, pipeline: Any, texts: list[str], device: torch.device, negative: bool) -> Mapping[str, Any]:
        """Qwen3's tokens, padded, and their mask."""
        embeds, _ = pipeline.encode_prompt(
            prompt=list(texts),  # it writes into the list that it is given
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=device,
        )
        masks = [text.new_ones(len(text), dtype=torch.bool) for text in embeds]
        return {
            "prompt_embeds": pad_sequence(embeds, batch_first=True),
            "prompt_embeds_mask": pad_sequence(masks, batch_first=True),
        }

    @property
    def max_tokens_a_side(self) -> int | None:
        """Of the tables of positions of rows and columns, the shorter one."""
        return int(min(self.pipeline.transformer.config.axes_lens[1:]))

    def predict(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor], guidance_scale: float) -> Tensor:
        """The transformer's time runs from noise to image, at 1 - sigma, and so does its velocity: minus ours.

        It takes lists: of images, with an axis of frames, and of texts without padding.
        """
        texts = zip(tensors["prompt_embeds"], tensors["prompt_embeds_mask"], strict=True)
        outputs = self.transformer(
            x=list(latents[:, :, None]),
            t=1 - sigma,
            cap_feats=[text[mask] for text, mask in texts],
            return_dict=False,
        )[0]
        return -torch.stack(outputs)[:, :, 0]

    def pipeline_call(self, guidance_scale: float, negative_prompts: list[str] | None) -> dict[str, Any]:
        """The pipeline counts guidance from 0."""
        return super().pipeline_call(guidance_scale - 1, negative_prompts)
