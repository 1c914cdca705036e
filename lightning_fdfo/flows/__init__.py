"""Adapters, one model family a file."""

from lightning_fdfo.flows.stable_diffusion_3 import StableDiffusion3

__all__ = ["StableDiffusion3"]
