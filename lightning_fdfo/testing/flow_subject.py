"""Subject: a flow model, and how the conformance checks try it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.diffusers_flow import DiffusersFlow
from lightning_fdfo.sampling import sample

PROMPTS = ("a cat", 'a long sign above the door that says "open at nine", at night', "two dogs")
NEGATIVES = ("", "blurry, and far too dark to see", "dogs")


@dataclass
class Subject:
    """A flow model and how it is tried."""

    flow: DiffusersFlow
    given_sizes: Sequence[tuple[int, int]] | None
    num_steps: int
    guidance_scale: float
    device: torch.device
    tolerance: float
    plain: Any = field(default=None)

    @cached_property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Those given, else a square and an oblong of a few tokens."""
        multiple = self.flow.size_multiple
        return self.given_sizes or ((4 * multiple, 4 * multiple), (4 * multiple, 6 * multiple))

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """Without and with guidance."""
        return (1.0,) if self.flow.guidance == "none" else (1.0, self.guidance_scale)

    def negatives(self, guidance_scale: float) -> list[str] | None:
        """Negative prompts, where they are used."""
        return list(NEGATIVES) if self.flow.uses_negatives(guidance_scale) else None

    def latents(self, size: tuple[int, int]) -> Tensor:
        """The same for all: [3, C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        shape = (len(PROMPTS), *self.flow.latent_shape(*size))
        return torch.randn(shape, generator=generator).to(self.device)

    @torch.no_grad()
    def encode(self, guidance_scale: float = 1.0) -> Conditioning:
        """Of the prompts."""
        with self.flow.encoding():
            return self.flow.encode(list(PROMPTS), self.negatives(guidance_scale))

    @torch.no_grad()
    def our_images(self, size: tuple[int, int], guidance_scale: float) -> Tensor:
        """By the sampler, without churn."""
        conditioning = self.encode(guidance_scale)
        end = sample(
            lambda x, sigma: self.flow.velocity(x, sigma, conditioning, guidance_scale),
            self.latents(size),
            self.flow.sigmas(self.num_steps, *size),
        )
        return self.flow.decode(end)

    @torch.no_grad()
    def their_images(self, size: tuple[int, int], guidance_scale: float) -> Tensor:
        """By the call of a pipeline of its own."""
        images: Tensor = self.plain(
            prompt=list(PROMPTS),
            height=size[0],
            width=size[1],
            num_inference_steps=self.num_steps,
            latents=self.flow.pipeline_latents(self.latents(size)),
            output_type="pt",
            **self.flow.pipeline_call(guidance_scale, self.negatives(guidance_scale)),
        ).images
        return images.float()

    def velocity(self, rows: Sequence[int] = range(len(PROMPTS))) -> Tensor:
        """Of some rows, each at a sigma of its own."""
        sigma = torch.linspace(0.9, 0.2, len(PROMPTS), device=self.device)[list(rows)]
        return self.flow.velocity(self.latents(self.sizes[-1])[list(rows)], sigma, self.encode()[list(rows)])

    def far(self, ours: Tensor, theirs: Tensor, scale: float = 1.0) -> float | None:
        """The largest difference, if it is beyond the tolerance."""
        largest = (ours - theirs).abs().max().item()
        return None if largest <= self.tolerance * scale else largest
