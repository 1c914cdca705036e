"""FlowFamily: what a model family declares, and which family serves which pipeline.

A family is found by the pipeline class that a folder's `model_index.json` names. How to write one:
docs/model_families.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.latents import dynamic_shift, nearest_multiple
from lightning_fdfo.flows.model_files import read_index, resolve_pretrained

JOINT_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""Projections of image and of text tokens, in blocks where both attend to both."""


class FlowFamily(ABC):
    """The hooks of a model family, for `DiffusersFlow`; a subclass says where its model differs.

    A subclass is entered in `registered` by the pipelines that it serves. A class that serves none gives an instance of
    the family that does.
    """

    registered: ClassVar[dict[str, type[FlowFamily]]] = {}
    """Name of a pipeline class in diffusers -> family."""
    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    """Names in diffusers of the pipelines that the family serves."""
    pipeline_class: ClassVar[type[Any] | None] = None
    """The pipeline's class, where diffusers has none of that name."""
    sequence_length: ClassVar[int]
    """Default of `max_sequence_length`."""
    sequence_range: ClassVar[tuple[int, int]] = (0, 8192)
    """Least and largest `max_sequence_length`."""
    block_names: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """Lists of the transformer's repeated blocks."""
    patch_size: ClassVar[int] = 2
    """Latent pixels a token, in height and in width."""

    transformer: nn.Module
    """The loaded model."""
    max_sequence_length: int
    """Tokens of a text, at most."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in cls.__dict__.get("pipeline_classes", ()):  # a subclass does not take its parent's place
            FlowFamily.registered[name] = cls

    def __new__(cls, *args: Any, **options: Any) -> FlowFamily:
        """An instance of the class, or of the family that serves the pipeline if the class serves none."""
        if cls.pipeline_classes:
            return super().__new__(cls)
        pretrained = args[0] if args else options["pretrained"]
        return super().__new__(family_for(pretrained, options.get("revision")))

    @property
    @abstractmethod
    def pretrained(self) -> str:
        """The folder or hub name that the pipeline is loaded from."""

    @property
    @abstractmethod
    def pipeline(self) -> Any:
        """The loaded pipeline; before `load`, one without weights."""

    def adapt(self, pipeline: Any) -> None:
        """Changes a pipeline that was just loaded, if the family needs that.

        Raises:
            ConfigurationError: its scheduler is not Euler's.
        """
        scheduler = type(pipeline.scheduler).__name__
        if scheduler != "FlowMatchEulerDiscreteScheduler":
            raise ConfigurationError(
                f"flow.pretrained: {self.pretrained} has a {scheduler}, expected a FlowMatchEulerDiscreteScheduler"
            )

    # Texts and the transformer

    def encode_texts(self, pipeline: Any, texts: list[str], device: torch.device, negative: bool) -> Mapping[str, Any]:
        """Texts to named tensors, a row each, by the pipeline's own `encode_prompt`.

        Args:
            pipeline: one with text encoders.
            texts: N texts.
            device: where the encoders are.
            negative: whether these are negative prompts, where the pipeline makes a difference.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its pipeline encodes texts")

    def predict(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor], guidance_scale: float) -> Tensor:
        """One forward of the transformer: the velocity without classifier-free guidance.

        Args:
            latents: [N, C, H, W], in the transformer's dtype.
            sigma: [N], float32.
            tensors: of `encode_texts`, floating ones in the transformer's dtype.
            guidance_scale: for a model that has it embedded.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its transformer is called")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.pipeline.transformer.config.in_channels)

    def guide(self, negative: Tensor, positive: Tensor, guidance_scale: float) -> Tensor:
        """Classifier-free guidance: negative + guidance_scale * (positive - negative)."""
        guided: Tensor = negative + guidance_scale * (positive - negative)
        return guided

    def grid(self, num_steps: int, num_tokens: int) -> dict[str, Any]:
        """Arguments of the scheduler's `set_timesteps`."""
        return {
            "sigmas": np.linspace(1.0, 1 / num_steps, num_steps),
            "mu": dynamic_shift(self.pipeline.scheduler.config, num_tokens),
        }

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents as the VAE decodes them."""
        config = self.pipeline.vae.config
        scaled: Tensor = latents / config.scaling_factor
        shift = config.get("shift_factor")  # None of a VAE that has no shift
        return scaled if shift is None else scaled + shift

    def pipeline_call(self, guidance_scale: float, negative_prompts: list[str] | None) -> dict[str, Any]:
        """Arguments of the pipeline's own call that say the same; for checks."""
        return {
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompts,
            "max_sequence_length": self.max_sequence_length,
        }

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        """Initial latents as the pipeline's own call takes them; for checks."""
        return latents

    @property
    def size_multiple(self) -> int:
        """Pixels a token: what height and width must be multiples of."""
        return int(self.pipeline.vae_scale_factor) * self.patch_size

    @property
    def max_tokens_a_side(self) -> int | None:
        """Image tokens in a row or column that the transformer has positions for, if there is an end to them."""
        return None

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(channels, height / f, width / f), where f is the VAE's factor; before `load`, too."""
        factor, multiple, most = self.pipeline.vae_scale_factor, self.size_multiple, self.max_tokens_a_side
        if height % multiple or width % multiple:
            raise ConfigurationError(
                f"image height and width must be multiples of {multiple}, got {height} x {width}; "
                f"nearest: {nearest_multiple(height, multiple)} x {nearest_multiple(width, multiple)}"
            )
        if most is not None and max(height, width) > most * multiple:
            raise ConfigurationError(
                f"image height and width: expected at most {most * multiple} pixels, for this model has positions for "
                f"{most} tokens a side, got {height} x {width}"
            )
        return (self.latent_channels, height // factor, width // factor)

    @property
    def blocks(self) -> list[nn.Module]:
        """The loaded transformer's repeated blocks, in order."""
        return [block for name in self.block_names for block in getattr(self.transformer, name)]

    @property
    def width(self) -> int:
        """Numbers a token in the transformer."""
        config: Any = self.transformer.config
        return int(config["num_attention_heads"] * config["attention_head_dim"])

    def num_tokens(self, height: int, width: int, conditioning: Conditioning) -> int:
        """Tokens of an image and its text."""
        pixels = height * width // self.size_multiple**2
        return pixels + max(t.shape[1] for t in conditioning.tensors.values() if t.ndim == 3)


def family_for(pretrained: str, revision: str | None = None) -> type[FlowFamily]:
    """The family that serves a folder's or hub model's pipeline.

    Args:
        pretrained: a shipped model, a folder or a hub name.
        revision: branch, tag or commit on the hub.

    Raises:
        ConfigurationError: there is none, or `model_index.json` cannot be had.

    Example:
        >>> import lightning_fdfo.flows
        >>> family_for("tiny-digits").__name__
        'StableDiffusion3'
    """
    name = read_index(resolve_pretrained(pretrained), revision)["_class_name"]
    if name not in FlowFamily.registered:
        raise ConfigurationError(
            f"flow.pretrained: {pretrained} holds a {name}, which no model family serves; there are families for "
            f"{', '.join(sorted(FlowFamily.registered))}; docs/model_families.md says how to write one"
        )
    return FlowFamily.registered[name]
