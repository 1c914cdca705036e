"""Base models, one family per file; `DiffusersFlow(pretrained)` gives the one that serves a pipeline."""

from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.diffusers_flow import DiffusersFlow
from lightning_fdfo.flows.flux import Flux
from lightning_fdfo.flows.flux2 import Flux2
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.model_files import resolve_pretrained
from lightning_fdfo.flows.qwen_image import QwenImage
from lightning_fdfo.flows.sana import Sana
from lightning_fdfo.flows.stable_diffusion_3 import StableDiffusion3
from lightning_fdfo.flows.z_image import ZImage

__all__ = [
    "Conditioning",
    "DiffusersFlow",
    "FlowModel",
    "Flux",
    "Flux2",
    "LoRA",
    "QwenImage",
    "Sana",
    "StableDiffusion3",
    "ZImage",
    "resolve_pretrained",
]
