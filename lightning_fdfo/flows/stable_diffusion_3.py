"""Stable Diffusion 3 and 3.5, and every folder in the format of diffusers' StableDiffusion3Pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flow import Conditioning, FlowModel

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve_pretrained(pretrained: str) -> str:
    """The folder of a shipped model's name, else the name itself (a folder or a hub name).

    Example:
        >>> resolve_pretrained("stabilityai/stable-diffusion-3.5-medium")
        'stabilityai/stable-diffusion-3.5-medium'
        >>> Path(resolve_pretrained("tiny-digits")).name
        'tiny-digits'
    """
    shipped = Path(str(files("lightning_fdfo.assets"))) / pretrained
    return str(shipped) if (shipped / "model_index.json").is_file() else pretrained


class StableDiffusion3(FlowModel):
    """Adapter for StableDiffusion3Pipeline.

    Args:
        pretrained: a shipped model (`tiny-digits`), a folder, or a hub name like
            `stabilityai/stable-diffusion-3.5-medium`.
        dtype: of the frozen weights; LoRA weights are always float32.
        max_sequence_length: T5 tokens of the pipeline, 0 to 512. A pipeline without T5 pads the text with this many
            zero vectors; 0 leaves them out, as `tiny-digits` was trained.
        gradient_checkpointing: less memory for more time.
        revision: branch, tag or commit on the hub.

    Example:
        >>> flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
        >>> flow.load()
        >>> flow.latent_shape(32, 64)
        (8, 8, 16)
        >>> flow.sigmas(4, 32, 64)[0].item()
        1.0
    """

    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def __init__(
        self,
        pretrained: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        max_sequence_length: int = 256,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.pretrained = resolve_pretrained(pretrained)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.max_sequence_length = max_sequence_length
        self.gradient_checkpointing = gradient_checkpointing
        self.revision = revision
        self._holder: dict[str, Any] = {}

    @property
    def pipeline(self) -> Any:
        """The loaded StableDiffusion3Pipeline; its transformer is this model's own."""
        return self._holder["pipeline"]

    def check(self) -> None:
        """Raises ConfigurationError if the folder is not a pipeline of this class; a hub name is not asked for."""
        folder = Path(self.pretrained)
        if not folder.is_dir():
            if HUB_NAME.fullmatch(self.pretrained):
                return
            raise ConfigurationError(
                f"flow.pretrained: expected a shipped model (tiny-digits), a folder or a hub name like "
                f"'owner/model', got {self.pretrained!r}, which is none of these"
            )
        self._read_index(folder)

    def load(self) -> None:
        """Loads the pipeline; optional parts that `model_index.json` leaves out are passed as None."""
        if self._holder:
            return
        self.check()
        try:
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                self.pretrained, dtype=self.dtype, revision=self.revision, **self._absent_parts()
            )
        except OSError as error:
            raise ConfigurationError(
                f"flow.pretrained: {self.pretrained!r} is neither a folder here nor a model that the hub gives: {error}"
            ) from error
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae", "transformer"):
            module = getattr(pipeline, name)
            if module is not None:
                module.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        self._holder["pipeline"] = pipeline
        self.transformer = pipeline.transformer
        if self.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()

    def to_device(self, device: torch.device) -> None:
        """Moves text encoders and VAE."""
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
            module = getattr(self.pipeline, name)
            if module is not None:
                module.to(device)

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> Conditioning:
        """Prompts to conditioning, by the pipeline's own `encode_prompt`."""
        texts = list(prompts)
        negatives = None if negative_prompts is None else list(negative_prompts)
        embeds, negative_embeds, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=texts,
            prompt_2=texts,
            prompt_3=texts,
            negative_prompt=negatives,
            negative_prompt_2=negatives,
            negative_prompt_3=negatives,
            do_classifier_free_guidance=negatives is not None,
            max_sequence_length=self.max_sequence_length,
            device=self.pipeline.text_encoder.device,
        )
        tensors = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if negatives is not None:
            tensors |= {"negative_prompt_embeds": negative_embeds, "negative_pooled_prompt_embeds": negative_pooled}
        return Conditioning(tensors)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(channels, height / 8, width / 8) for SD3's VAE."""
        factor = self.pipeline.vae_scale_factor
        multiple = factor * self.pipeline.patch_size
        if height % multiple or width % multiple:
            raise ConfigurationError(f"image height and width must be multiples of {multiple}, got {height} x {width}")
        return (self.pipeline.transformer.config.in_channels, height // factor, width // factor)

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """The scheduler's grid; `height` and `width` matter if it shifts with the size."""
        scheduler = self.pipeline.scheduler
        options = {}
        if scheduler.config.get("use_dynamic_shifting"):
            _, rows, columns = self.latent_shape(height, width)
            options["mu"] = _dynamic_shift(scheduler.config, rows * columns // self.pipeline.patch_size**2)
        grid = type(scheduler).from_config(scheduler.config)
        grid.set_timesteps(num_steps, **options)
        return torch.as_tensor(grid.sigmas, dtype=torch.float32).cpu()

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The transformer's output, with classifier-free guidance in one doubled batch."""
        parts = conditioning.tensors
        embeds, pooled = parts["prompt_embeds"], parts["pooled_prompt_embeds"]
        timestep = (1000 * sigma).to(latents.device).expand(len(latents))
        guided = guidance_scale != 1.0
        if guided:
            if "negative_prompt_embeds" not in parts:
                raise ValueError(f"guidance_scale={guidance_scale} needs encode(prompts, negative_prompts)")
            latents, timestep = torch.cat([latents, latents]), torch.cat([timestep, timestep])
            embeds = torch.cat([parts["negative_prompt_embeds"], embeds])
            pooled = torch.cat([parts["negative_pooled_prompt_embeds"], pooled])
        transformer: Any = self.transformer
        dtype = transformer.pos_embed.proj.weight.dtype  # the transformer's own: the text encoders' may be another
        velocity: Tensor = transformer(
            hidden_states=latents.to(dtype),
            timestep=timestep,
            encoder_hidden_states=embeds.to(dtype),
            pooled_projections=pooled.to(dtype),
            return_dict=False,
        )[0].float()
        if guided:
            negative, positive = velocity.chunk(2)
            velocity = negative + guidance_scale * (positive - negative)
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        """Through the VAE, to [0, 1]."""
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def save_lora(self, folder: Path) -> None:
        """By the pipeline's own `save_lora_weights`, with the metadata that carries alpha."""
        transformer = self.pipeline.transformer
        weights = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(transformer).items()}
        StableDiffusion3Pipeline.save_lora_weights(
            folder, transformer_lora_layers=weights, **_collate_lora_metadata({"transformer": transformer})
        )

    def _read_index(self, folder: Path) -> dict[str, Any]:
        """`model_index.json`, checked to be of this pipeline class."""
        path = folder / "model_index.json"
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"flow.pretrained: {folder} is no diffusers pipeline: cannot read {path.name} ({error})"
            ) from error
        if index.get("_class_name") != StableDiffusion3Pipeline.__name__:
            raise ConfigurationError(
                f"flow.pretrained: {folder} holds a {index.get('_class_name')}, expected a StableDiffusion3Pipeline"
            )
        return index

    def _absent_parts(self) -> dict[str, None]:
        """T5, where the pipeline has none: diffusers wants that said aloud."""
        folder = Path(self.pretrained)
        if not folder.is_dir():
            index = StableDiffusion3Pipeline.load_config(self.pretrained, revision=self.revision)
        else:
            index = self._read_index(folder)
        optional = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")
        return {name: None for name in optional if (index.get(name) or [None])[0] is None}


def _dynamic_shift(config: Any, num_tokens: int) -> float:
    """The pipeline's mu: linear in the number of image tokens."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (num_tokens - config.base_image_seq_len))
