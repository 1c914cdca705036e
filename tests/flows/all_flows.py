"""ALL_FLOWS: a tiny model of every family and variant, which every property test runs over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import FlowMatchEulerDiscreteScheduler

from lightning_fdfo.flows import (
    DiffusersFlow,
    Flux,
    Flux2,
    QwenImage,
    Sana,
    StableDiffusion3,
    ZImage,
    resolve_pretrained,
)
from tests.flows import test_flux, test_flux2, test_qwen_image, test_sana, test_z_image


class Case(NamedTuple):
    """A tiny model, and what is known of it."""

    name: str
    family: type[DiffusersFlow]
    build: Callable[[Path], Any]
    """Writes the pipeline into a folder."""
    num_tokens: int
    """Fewer than the longest prompt of the checks has, more than the others have."""
    size: tuple[int, int]
    """Height and width that fit."""
    latent_shape: tuple[int, ...]
    """Of that size."""
    multiple: int
    """What height and width must be multiples of."""
    guidance: str = "classifier-free"
    representative: bool = True
    """Whether it stands for its family where a variant makes no difference."""
    num_steps: int = 4
    """Of the sampler; a trained model's differences grow with it."""
    sizes: tuple[tuple[int, int], ...] | None = None
    """For `check_flow_model`, where its own are too large to be quick."""

    def flow(self, folder: Path, **options: Any) -> DiffusersFlow:
        """The model, not loaded."""
        return self.family(str(folder), **{"max_sequence_length": self.num_tokens, **options})


FLUX = partial(Case, family=Flux, num_tokens=48, size=(32, 48), latent_shape=(4, 8, 12), multiple=8)
FLUX2 = partial(Case, family=Flux2, num_tokens=48, size=(16, 24), latent_shape=(16, 4, 6), multiple=4)
SANA = partial(
    Case, family=Sana, num_tokens=32, size=(64, 96), latent_shape=(4, 2, 3), multiple=32, sizes=((64, 64), (64, 96))
)
Z_IMAGE = partial(Case, family=ZImage, num_tokens=64, size=(16, 24), latent_shape=(4, 8, 12), multiple=4)
SANA_OPTIONS = {
    "sana 1.5": {"timestep_scale": 0.001, "qk_norm": "rms_norm_across_heads"},
    "sana with a variance": {"out_channels": 8},
}

ALL_FLOWS = [
    Case(
        "sd3",
        StableDiffusion3,
        lambda folder: folder.symlink_to(resolve_pretrained("tiny-digits")),
        num_tokens=0,
        size=(32, 64),
        latent_shape=(8, 8, 16),
        multiple=8,
        num_steps=2,
    ),
    FLUX("flux dev", build=partial(test_flux.flux_folder, variant="dev"), guidance="embedded"),
    FLUX("flux schnell", build=partial(test_flux.flux_folder, variant="schnell"), guidance="none"),
    *(
        FLUX2(f"flux2 {variant}", build=partial(test_flux2.flux2_folder, variant=variant), guidance=guidance)
        for variant, guidance in test_flux2.GUIDANCE.items()
    ),
    Case("qwen image", QwenImage, test_qwen_image.qwen_image_folder, 48, (16, 24), (4, 8, 12), 4),
    SANA("sana 1.0", build=test_sana.sana_folder),
    *(
        SANA(name, build=partial(test_sana.sana_folder, **options), representative=False)
        for name, options in SANA_OPTIONS.items()
    ),
    Z_IMAGE("z_image turbo", build=partial(test_z_image.z_image_folder, scheduler=test_z_image.TURBO)),
    Z_IMAGE(
        "z_image dynamic",
        build=partial(
            test_z_image.z_image_folder, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        ),
        representative=False,
    ),
]
