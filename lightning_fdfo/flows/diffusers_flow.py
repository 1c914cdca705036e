"""DiffusersFlow: what all model families share, for models that diffusers has a pipeline for.

    texts --encode_texts--> named tensors --predict(latents, sigma)--> velocity
    sigmas: the pipeline's scheduler, with the options of `grid`;  decode: `unscale`, then the pipeline's VAE

Latents keep their places, [N, C, H, W]: what a transformer wants as a row of tokens is packed inside `predict`.
Where the pipeline is and how it is loaded: pipeline_source.py. When texts are encoded: text_encoding.py.
How to write a family: docs/model_families.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.attention import check_attention, check_takes, set_attention
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.compilation import Compile, check_compile, compile_in_place
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.latents import to_unit_range
from lightning_fdfo.flows.pipeline_source import TEXT_COMPONENTS, PipelineSource
from lightning_fdfo.flows.quantization import Quantization
from lightning_fdfo.flows.registry import FlowFamily
from lightning_fdfo.flows.text_encoding import Cached, Offloaded, Resident, TextEncoders, TextEncoding

Dtype = Literal["float32", "bfloat16", "float16"]


class DiffusersFlow(FlowFamily, FlowModel):
    """A flow model that diffusers has a pipeline for.

    Called by itself it gives the model family that serves the pipeline in `model_index.json`: it reads the folder, or
    asks the hub for this one small file. A family's own class, such as `Flux`, asks for nothing.

    Args:
        pretrained: a shipped model (`tiny-digits`), a folder, or a hub name like
            `stabilityai/stable-diffusion-3.5-medium`.
        dtype: of the frozen weights; what trains is always float32.
        max_sequence_length: tokens of a text, at most; None takes what the pipeline takes.
        gradient_checkpointing: less memory for more time.
        text_encoders: `offload` puts them on the device only while texts are encoded, `keep` leaves them there,
            `cache` encodes all texts once, before training, into `text_cache`, and then frees them.
        text_cache: folder of `cache`; None takes `~/.cache/lightning_fdfo/texts`.
        vae_slicing: decodes image by image: less memory for more time.
        vae_tiling: decodes in overlapping tiles: less memory for large images, and faint seams.
        quantization: of the frozen transformer: `nf4` or `int8` by bitsandbytes, `int8_torchao` by torchao.
        revision: branch, tag or commit on the hub.
        compile: the transformer by torch.compile: `regional` each repeated block, `full` as a whole, or `none`.
        attention: back-end of the transformer's attention, by diffusers' name, such as `_native_cudnn` or `flash`;
            None leaves diffusers' default, by which PyTorch chooses.

    Raises:
        ConfigurationError: no model family serves the pipeline; from `validate` and `load`, if it is of another class
            than the family's or cannot be had.

    Example:
        >>> type(DiffusersFlow("tiny-digits")).__name__
        'StableDiffusion3'
    """

    def __init__(
        self,
        pretrained: str,
        dtype: Dtype = "float32",
        max_sequence_length: int | None = None,
        gradient_checkpointing: bool = False,
        text_encoders: TextEncoders = "offload",
        text_cache: str | None = None,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        quantization: Quantization | None = None,
        revision: str | None = None,
        compile: Compile = "none",
        attention: str | None = None,
    ) -> None:
        super().__init__()
        _check_choice("dtype", dtype, get_args(Dtype))
        _check_choice("text_encoders", text_encoders, get_args(TextEncoders))
        _check_choice("quantization", quantization, (None, *get_args(Quantization)))
        _check_choice("compile", compile, get_args(Compile))
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.max_sequence_length = self.sequence_length if max_sequence_length is None else max_sequence_length
        self.gradient_checkpointing = gradient_checkpointing
        self.text_encoders = text_encoders
        self.vae_slicing = vae_slicing
        self.vae_tiling = vae_tiling
        self.quantization = quantization
        self.revision = revision
        self.compilation: Compile = compile  # `compile` is a method of nn.Module
        self.attention = attention
        self.source = PipelineSource(
            pretrained,
            revision,
            self.dtype,
            quantization,
            family=type(self).__name__,
            serves=self.pipeline_classes,
            pipeline_class=self.pipeline_class,
        )
        self.text_encoding: TextEncoding
        """When texts are encoded, and where."""
        if text_encoders == "cache":
            self.text_encoding = Cached(self, Path(text_cache or "~/.cache/lightning_fdfo/texts").expanduser())
        else:
            self.text_encoding = Resident(self) if text_encoders == "keep" else Offloaded(self)
        self._pipeline: Any = None
        self._compute_dtype = self.dtype

    # Loading

    @property
    def pretrained(self) -> str:
        """The folder or hub name that the pipeline is loaded from."""
        return self.source.pretrained

    @property
    def is_loaded(self) -> bool:
        """Whether `load` was called."""
        return self._pipeline is not None

    @property
    def pipeline(self) -> Any:
        """The loaded pipeline, whose transformer is this model's own; before `load`, one without weights."""
        return self._pipeline if self.is_loaded else self._outlined

    @cached_property
    def _outlined(self) -> Any:
        pipeline = self.source.outline()
        self.adapt(pipeline)
        check_takes(pipeline.transformer, self.attention)
        return pipeline

    def outline(self) -> nn.Module:
        """The transformer without its weights: reads a folder, or asks the hub for a few small files."""
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    def validate(self) -> None:
        """Raises ConfigurationError for a setting that cannot work, or a folder that is not a pipeline of this class.

        A hub name is not asked for.
        """
        length, (least, largest) = self.max_sequence_length, self.sequence_range
        if not least <= length <= largest:
            raise ConfigurationError(
                f"flow.max_sequence_length: {type(self).__name__} expected {least} to {largest} tokens, got {length}; "
                f"null takes {self.sequence_length}"
            )
        check_compile(self.compilation, len(self.block_names), type(self).__name__)
        check_attention(self.attention)
        self.source.validate()

    def load(self) -> None:
        """Loads the pipeline, without text encoders where their outputs are cached."""
        if self.is_loaded:
            return
        self.validate()
        left_out = [] if self.text_encoding.needs_encoders else self.source.component_names(*TEXT_COMPONENTS)
        pipeline = self.load_pipeline(**dict.fromkeys(left_out))
        for module in self.source.modules(pipeline, "text_encoder", "vae", "transformer").values():
            module.requires_grad_(False).eval()
        if self.vae_slicing:
            pipeline.vae.enable_slicing()
        if self.vae_tiling:
            pipeline.vae.enable_tiling()
        if self.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        set_attention(pipeline.transformer, self.attention)
        self._pipeline = pipeline
        self.__dict__.pop("_outlined", None)
        self.transformer = pipeline.transformer

    def load_pipeline(self, **components: Any) -> Any:
        """A pipeline of one's own; `components` are taken instead of the folder's, and None leaves one out.

        Raises:
            ConfigurationError: see `PipelineSource.load` and `adapt`.
        """
        pipeline = self.source.load(**components)
        self.adapt(pipeline)
        return pipeline

    def to_device(self, device: torch.device) -> None:
        """Moves the VAE, and text encoders that stay."""
        self.pipeline.vae.to(device)
        self.text_encoding.to_device(device)

    def __getstate__(self) -> dict[str, Any]:
        """For `pickle`; raises ConfigurationError once the model is loaded: text encoders have hooks that cannot be."""
        if self.is_loaded:
            raise ConfigurationError(
                f"{type(self).__name__} is loaded, and a loaded model cannot be pickled: pickle it before, save what "
                "trains by trainer.save_checkpoint or lora_files.save_lora, or copy it by copy.deepcopy"
            )
        return {name: value for name, value in self.__dict__.items() if name != "_outlined"}

    def __deepcopy__(self, memo: dict[int, Any]) -> DiffusersFlow:
        twin: DiffusersFlow = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    # Texts

    @property
    def text_modules(self) -> list[nn.Module]:
        """The loaded text encoders."""
        return list(self.source.modules(self.pipeline, "text_encoder").values())

    def encoding(self) -> AbstractContextManager[None]:
        """While it is open, text encoders that are offloaded are on the device."""
        return self.text_encoding.open()

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> Conditioning:
        """Prompts to conditioning; the tensors of negative prompts are named `negative_…`."""
        conditioning = Conditioning(self.text_encoding.encode(prompts, negative=False))
        if negative_prompts is None:
            return conditioning
        return conditioning.with_negatives(self.text_encoding.encode(negative_prompts, negative=True))

    def prepare_texts(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] = lambda: None,
    ) -> None:
        """Encodes them into the cache, where `text_encoders` says so; negative ones if guidance uses them."""
        negatives = negative_prompts if self.guidance == "classifier-free" else []
        self.text_encoding.prepare(prompts, negatives, device, rank=rank, world_size=world_size, barrier=barrier)

    # Sampling

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """The scheduler's grid; `height` and `width` matter if it shifts with the size."""
        _, rows, columns = self.latent_shape(height, width)
        scheduler = self.pipeline.scheduler
        fresh = type(scheduler).from_config(scheduler.config)
        fresh.set_timesteps(**self.grid(num_steps, rows * columns // self.patch_size**2))
        return torch.as_tensor(fresh.sigmas, dtype=torch.float32).cpu()

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The transformer's output, with classifier-free guidance in one doubled batch."""
        sigma = sigma.to(latents.device).expand(len(latents))
        positive, negative = conditioning.split_negatives()
        if not self.uses_negatives(guidance_scale):
            return self._predict(latents, sigma, positive, guidance_scale)
        if not negative.tensors:
            raise ValueError(f"guidance_scale={guidance_scale} needs encode(prompts, negative_prompts)")
        both = Conditioning.cat([negative, positive])
        twice = self._predict(torch.cat([latents, latents]), torch.cat([sigma, sigma]), both, guidance_scale)
        negative_velocity, positive_velocity = twice.chunk(2)
        return self.guide(negative_velocity, positive_velocity, guidance_scale)

    def _predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        dtype = self._compute_dtype  # the transformer's own: the text encoders' may be another
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in conditioning.tensors.items()}
        return self.predict(latents.to(dtype), sigma, tensors, guidance_scale).float()

    @property
    def lora_reader(self) -> Callable[..., Any]:
        """The pipeline's own."""
        reader: Callable[..., Any] = self.source.pipeline_class.lora_state_dict
        return reader

    def train_all(self) -> None:
        """Makes the whole loaded transformer trainable, in float32."""
        super().train_all()
        self._compute_dtype = torch.float32

    def compile_transformer(self) -> None:
        """As `compile` says; text encoders and VAE are not compiled."""
        compile_in_place(self.compilation, self.transformer, self.blocks)

    def decode(self, latents: Tensor) -> Tensor:
        """Through the VAE, to [0, 1]."""
        vae = self.pipeline.vae
        images: Tensor = vae.decode(self.unscale(latents).to(vae.dtype), return_dict=False)[0]
        return to_unit_range(images)


def _check_choice(name: str, given: object, choices: tuple[object, ...]) -> None:
    if given not in choices:
        raise ConfigurationError(f"flow.{name}: expected one of {', '.join(map(str, choices))}, got {given!r}")
