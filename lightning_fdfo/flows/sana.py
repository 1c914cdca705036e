"""SANA."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.diffusers_flow import DiffusersFlow


class Sana(DiffusersFlow):
    """SanaPipeline: classifier-free guidance, latents [32, H / 32, W / 32], each pixel a token.

    Prompts are encoded behind the pipeline's default instruction to enhance them, negative prompts by themselves.
    Images have the size that is asked for: the pipeline's own call gives the same with `use_resolution_binning=False`.
    A folder with the DPM solver gets Euler's scheduler with the same shift.

    Source: arXiv 2410.10629.
    """

    pipeline_classes = ("SanaPipeline",)
    sequence_length = 300
    sequence_range = (1, 8192)
    patch_size = 1
    lora_targets = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
    )

    def adapt(self, pipeline: Any) -> None:
        """Takes Euler's scheduler in place of the DPM solver for flows."""
        scheduler = pipeline.scheduler
        if type(scheduler).__name__ == "DPMSolverMultistepScheduler" and scheduler.config.use_flow_sigmas:
            # Churn and the objective are about Euler's steps: one velocity a step, and none of the steps before.
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=scheduler.config.flow_shift)
        super().adapt(pipeline)

    def encode_texts(self, pipeline: Any, texts: list[str], device: torch.device, negative: bool) -> Mapping[str, Any]:
        """Gemma's tokens and their mask."""
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompt=texts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=None if negative else instruction,
            device=device,
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def grid(self, num_steps: int, num_tokens: int) -> dict[str, Any]:
        """A number of steps; the shift does not change with the size."""
        return {"num_inference_steps": num_steps}

    def predict(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor], guidance_scale: float) -> Tensor:
        """At timestep 1000 sigma, scaled; channels beyond the latents' are a variance, which flows have no use for."""
        config: Any = self.transformer.config
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=1000 * sigma * config.timestep_scale,
            encoder_hidden_states=tensors["prompt_embeds"],
            encoder_attention_mask=tensors["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return velocity[:, : latents.shape[1]]

    def num_tokens(self, height: int, width: int, conditioning: Conditioning) -> int:
        """Of the image alone: blocks look at the text from aside."""
        return height * width // self.size_multiple**2

    def pipeline_call(self, guidance_scale: float, negative_prompts: list[str] | None) -> dict[str, Any]:
        """At the size that is asked for."""
        return {**super().pipeline_call(guidance_scale, negative_prompts), "use_resolution_binning": False}
