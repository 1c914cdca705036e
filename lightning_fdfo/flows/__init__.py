"""Adapters, one model family a file; `from_pretrained` picks the one that serves a pipeline."""

from __future__ import annotations

from lightning_fdfo.flows.diffusers_flow import DiffusersFlow, resolve_pretrained
from lightning_fdfo.flows.flux import Flux
from lightning_fdfo.flows.stable_diffusion_3 import StableDiffusion3

__all__ = ["DiffusersFlow", "Flux", "StableDiffusion3", "resolve_pretrained"]
