"""Adapters, one model family a file; `DiffusersFlow(pretrained)` is the one that serves a pipeline."""

from lightning_fdfo.flows.diffusers_flow import DiffusersFlow
from lightning_fdfo.flows.flux import Flux
from lightning_fdfo.flows.flux2 import Flux2
from lightning_fdfo.flows.qwen_image import QwenImage
from lightning_fdfo.flows.registry import resolve_pretrained
from lightning_fdfo.flows.sana import Sana
from lightning_fdfo.flows.stable_diffusion_3 import StableDiffusion3
from lightning_fdfo.flows.z_image import ZImage

__all__ = ["DiffusersFlow", "Flux", "Flux2", "QwenImage", "Sana", "StableDiffusion3", "ZImage", "resolve_pretrained"]
