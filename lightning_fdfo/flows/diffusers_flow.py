"""DiffusersFlow: what the adapters share. An adapter says how its model differs, on the pipeline that diffusers has.

    texts --encode_texts--> named tensors --predict(latents, sigma)--> velocity
    sigmas: the pipeline's scheduler, with the options of `grid`;  decode: `unscale`, then the pipeline's VAE

Latents keep their places, [N, C, H, W]: what a transformer wants as a row of tokens is packed inside `predict`.
How to write an adapter: docs/adapters.md.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.finite import first_not_finite
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.model_files import (
    CONFIGURATION,
    UNREADABLE,
    check_complete,
    check_parts,
    described,
    meta_tensors,
    text_encoders,
)
from lightning_fdfo.flows.quantization import Quantization, quantization_config
from lightning_fdfo.flows.registry import (
    Adapter,
    download_command,
    is_folder,
    model_folder,
    read_index,
    resolve_pretrained,
)
from lightning_fdfo.flows.text_cache import TextCache, text_fingerprint
from lightning_fdfo.hub import is_hub_name, is_hubs, out_of_reach

TextEncoders = Literal["offload", "keep", "cache"]
JOINT_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""Projections of image and of text tokens, in blocks where both attend to both."""
DTYPES = ("float32", "bfloat16", "float16")
TEXTS_A_SHARD = 32
"""Texts that are encoded, and written to the cache, at once."""


class DiffusersFlow(Adapter, FlowModel):
    """A flow model that diffusers has a pipeline for.

    Called by itself it gives the adapter that serves the pipeline in `model_index.json`; that reads a folder, or asks
    the hub for one small file. To name the adapter's own class asks nobody.

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

    Raises:
        ConfigurationError: no adapter serves the pipeline; from `validate` and `load`, if it is of another class than
            the adapter's or cannot be had.

    Example:
        >>> type(DiffusersFlow("tiny-digits")).__name__
        'StableDiffusion3'
    """

    sequence_length: ClassVar[int]
    """Default of `max_sequence_length`."""
    sequence_range: ClassVar[tuple[int, int]] = (0, 8192)
    """Least and largest `max_sequence_length`."""
    block_names: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """Lists of the transformer's repeated blocks."""
    patch_size: ClassVar[int] = 2
    """Latent pixels a token, in height and in width."""

    def __init__(
        self,
        pretrained: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        max_sequence_length: int | None = None,
        gradient_checkpointing: bool = False,
        text_encoders: TextEncoders = "offload",
        text_cache: str | None = None,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        quantization: Quantization | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.pretrained = resolve_pretrained(pretrained)
        if dtype not in DTYPES:
            raise ConfigurationError(f"flow.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.max_sequence_length = self.sequence_length if max_sequence_length is None else max_sequence_length
        self.gradient_checkpointing = gradient_checkpointing
        self.text_encoders = text_encoders
        self.text_cache = Path(text_cache or "~/.cache/lightning_fdfo/texts").expanduser()
        self.vae_slicing = vae_slicing
        self.vae_tiling = vae_tiling
        self.quantization = quantization
        self.revision = revision
        self._holder: dict[str, Any] = {}
        self._device = torch.device("cpu")
        self._compute_dtype = self.dtype

    # What an adapter says

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

    # Loading

    @property
    def pipeline(self) -> Any:
        """The loaded pipeline, whose transformer is this model's own; before `load`, one without weights."""
        if "pipeline" not in self._holder:
            return self._sketch
        return self._holder["pipeline"]

    @cached_property
    def _sketch(self) -> Any:
        """The pipeline by its configuration files: transformer and VAE have shapes alone, and there are no encoders."""
        folder = model_folder(self.pretrained, self.revision, CONFIGURATION)
        texts = self._parts("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
        with self._readable():
            parts = {name: described(self.index, folder, name) for name in ("transformer", "vae")}
            pipeline = self.pipeline_class.from_pretrained(str(folder), **parts, **dict.fromkeys(texts))
        self.adapt(pipeline)
        return pipeline

    def __getstate__(self) -> dict[str, Any]:
        """For `pickle`; raises ConfigurationError once the model is loaded: text encoders have hooks that cannot be."""
        if "pipeline" in self._holder:
            raise ConfigurationError(
                f"{type(self).__name__} is loaded, and a loaded model cannot be pickled: pickle it before, save what "
                "trains by trainer.save_checkpoint or flow.save_lora, or copy it by copy.deepcopy"
            )
        return {name: value for name, value in self.__dict__.items() if name != "_sketch"}

    def __deepcopy__(self, memo: dict[int, Any]) -> DiffusersFlow:
        twin: DiffusersFlow = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def outline(self) -> nn.Module:
        """The transformer without its weights: reads a folder, or asks the hub for a few small files."""
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    def validate(self) -> None:
        """Raises ConfigurationError for a setting that cannot work, or a folder that is not a pipeline of this class.

        A hub name is not asked for.
        """
        check_settings(self)
        if self.quantization is not None:
            quantization_config(self.quantization, self.dtype)
        if is_folder(self.pretrained) or not is_hub_name(self.pretrained):
            check_parts(self.index, Path(self.pretrained))

    def load(self) -> None:
        """Loads the pipeline, without text encoders where their outputs are cached."""
        if "pipeline" in self._holder:
            return
        self.validate()
        absent = self._parts("text_encoder", "tokenizer") if self.text_encoders == "cache" else []
        pipeline = self.load_pipeline(**dict.fromkeys(absent))
        for name in self._parts("text_encoder", "vae", "transformer"):
            module = getattr(pipeline, name)
            if module is not None:
                module.requires_grad_(False).eval()
        if self.vae_slicing:
            pipeline.vae.enable_slicing()
        if self.vae_tiling:
            pipeline.vae.enable_tiling()
        self._holder["pipeline"] = pipeline
        self.__dict__.pop("_sketch", None)
        self.transformer = pipeline.transformer
        if self.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()

    def load_pipeline(self, **parts: Any) -> Any:
        """A pipeline of one's own from `pretrained`, in `dtype`.

        Args:
            **parts: those to take instead of the folder's; None leaves one out.

        Raises:
            ConfigurationError: it cannot be had or read, or its weights lack a tensor.
        """
        common: dict[str, Any] = {"dtype": self.dtype}
        if not is_folder(self.pretrained):
            common["revision"] = self.revision
        options: dict[str, Any] = {**common, **dict.fromkeys(self._absent()), **parts}
        if self.quantization is not None and "transformer" not in parts:
            options["quantization_config"] = quantization_config(self.quantization, self.dtype)
        names = [name for name in self._parts("text_encoder") if name not in options]
        with self._readable():
            options |= text_encoders(self.index, self.pretrained, names, **common)
            pipeline = self.pipeline_class.from_pretrained(self.pretrained, **options)
        for name in {"transformer", "vae"} - set(parts):
            check_complete(self.pretrained, name, meta_tensors(getattr(pipeline, name)))
        pipeline.set_progress_bar_config(disable=True)
        self._check_weights(pipeline)
        self.adapt(pipeline)
        return pipeline

    def _check_weights(self, pipeline: Any) -> None:
        """Raises ConfigurationError, with the tensor's name, if a weight is not finite: nothing could come of it."""
        for part in self._parts("text_encoder", "vae", "transformer"):
            module = getattr(pipeline, part)
            wrong = None if module is None else first_not_finite(dict(module.named_parameters()))
            if wrong is not None:
                raise ConfigurationError(
                    f"flow.pretrained: {self.pretrained}, read as {self.dtype}: {part}.{wrong}: the file is damaged "
                    "(fetch it again), or its numbers are beyond the range of flow.dtype (choose another)"
                )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turns what a folder or the hub can do to a loader into a ConfigurationError."""
        try:
            yield
        except (ConfigurationError, torch.OutOfMemoryError):
            raise
        except UNREADABLE as error:
            raise ConfigurationError(self._unreadable(error)) from error

    def _unreadable(self, error: Exception) -> str:
        command = download_command(self.pretrained, self.revision)
        on_hub = not is_folder(self.pretrained)
        if on_hub and is_hubs(error):
            what = f"flow.pretrained: {self.pretrained}: its files"
            return out_of_reach(error, self.pretrained, self.revision, what=what, command=command)
        cure = f"fetch it by: {command}" if on_hub else "download or save it again, all of it"
        why = " ".join(str(error).split()).split(" If you want")[0]  # diffusers' advice to load it nevertheless
        return f"flow.pretrained: {self.pretrained} is no model that can be read: {why}; {cure}"

    def adapt(self, pipeline: Any) -> None:
        """Changes a pipeline that was just loaded, if the adapter needs that; raises if its scheduler is no Euler."""
        scheduler = type(pipeline.scheduler).__name__
        if scheduler != "FlowMatchEulerDiscreteScheduler":
            raise ConfigurationError(
                f"flow.pretrained: {self.pretrained} has a {scheduler}, expected a FlowMatchEulerDiscreteScheduler"
            )

    @property
    def pipeline_class(self) -> Any:
        """The class that `model_index.json` names."""
        return getattr(diffusers, self.index["_class_name"])

    @cached_property
    def index(self) -> dict[str, Any]:
        """`model_index.json`, of a class that this adapter serves."""
        index = read_index(self.pretrained, self.revision)
        if index.get("_class_name") not in self.pipeline_classes:
            raise ConfigurationError(
                f"flow.pretrained: {self.pretrained} holds a {index.get('_class_name')}, "
                f"{type(self).__name__} expected a {' or '.join(self.pipeline_classes)}"
            )
        return index

    def _absent(self) -> list[str]:
        """Optional parts that the folder lacks: diffusers wants that said aloud."""
        names = []
        for name, parameter in inspect.signature(self.pipeline_class.__init__).parameters.items():
            given = self.index.get(name, [None, None])
            if isinstance(given, list) and given[0] is None and parameter.default in (parameter.empty, None):
                names.append(name)
        return [name for name in names if name not in ("self", "scheduler", "transformer", "vae")]

    @property
    def absent_texts(self) -> list[str]:
        """Text encoders and tokenizers that the folder lacks, for which plain diffusers must be given None."""
        return [name for name in self._absent() if name.startswith(("text_encoder", "tokenizer"))]

    def _parts(self, *prefixes: str) -> list[str]:
        """Names of the pipeline's parts that start so."""
        parameters = inspect.signature(self.pipeline_class.__init__).parameters
        return [name for name in parameters if name.startswith(prefixes)]

    def to_device(self, device: torch.device) -> None:
        """Moves the VAE, and text encoders that stay."""
        self._device = device
        self.pipeline.vae.to(device)
        if self.text_encoders == "keep":
            self._move_text_encoders(self.pipeline, device)

    @property
    def text_modules(self) -> list[nn.Module]:
        """The loaded text encoders."""
        modules = [getattr(self.pipeline, name) for name in self._parts("text_encoder")]
        return [module for module in modules if module is not None]

    def _move_text_encoders(self, pipeline: Any, device: torch.device) -> None:
        for name in self._parts("text_encoder"):
            module = getattr(pipeline, name)
            if module is not None:
                module.to(device)

    # Texts

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """While it is open, text encoders that are offloaded are on the device."""
        if self.text_encoders != "offload":
            yield
            return
        self._move_text_encoders(self.pipeline, self._device)
        try:
            yield
        finally:
            self._move_text_encoders(self.pipeline, torch.device("cpu"))

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> Conditioning:
        """Prompts to conditioning; the tensors of negative prompts are named `negative_…`."""
        tensors = dict(self._encode(prompts, negative=False))
        if negative_prompts is not None:
            negatives = self._encode(negative_prompts, negative=True)
            tensors |= {f"negative_{name}": tensor for name, tensor in negatives.items()}
        return Conditioning(tensors)

    def _encode(self, texts: Sequence[str], negative: bool) -> Mapping[str, Tensor]:
        if self.text_encoders == "cache":
            self._cache_texts(texts, negative)
            return self._cache(negative).read(texts).to(self._device).tensors
        return self.encode_texts(self.pipeline, list(texts), self._device, negative)

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
        """Encodes what the cache lacks, each process its share, with text encoders that are freed after it."""
        if self.text_encoders != "cache":
            return
        self._device = device
        share = slice(rank, None, world_size)
        with suppress(ConfigurationError):  # all processes report it below: here the others wait
            self._fill_cache(prompts[share], negative_prompts[share])
        barrier()
        self._fill_cache(prompts, negative_prompts)

    def _fill_cache(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> None:
        self._cache_texts(prompts, negative=False)
        self._cache_texts(negative_prompts, negative=True)
        self._holder.pop("text_pipeline", None)

    @torch.no_grad()
    def _cache_texts(self, texts: Sequence[str], negative: bool) -> None:
        cache = self._cache(negative)
        missing = cache.missing(texts)
        for start in range(0, len(missing), TEXTS_A_SHARD):
            chunk = missing[start : start + TEXTS_A_SHARD]
            pipeline = self._text_pipeline()
            cache.write(chunk, Conditioning(self.encode_texts(pipeline, chunk, self._device, negative)))

    def _text_pipeline(self) -> Any:
        """One with text encoders on the device, whose transformer and VAE are descriptions without weights."""
        if "text_pipeline" not in self._holder:
            folder = model_folder(self.pretrained, self.revision, CONFIGURATION)
            parts = {name: described(self.index, folder, name) for name in ("transformer", "vae")}
            pipeline = self.load_pipeline(**parts)
            self._move_text_encoders(pipeline, self._device)
            self._holder["text_pipeline"] = pipeline
        return self._holder["text_pipeline"]

    def _cache(self, negative: bool) -> TextCache:
        kind = self._device.type
        autocast = str(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        adapter = f"{type(self).__module__}.{type(self).__qualname__}"
        length = str(self.max_sequence_length)
        settings = (adapter, _source(self.encode_texts), str(self.dtype), autocast, length, str(negative))
        name = f"cache {settings}"
        if name not in self._holder:
            parts = self._parts("text_encoder", "tokenizer")
            fingerprint = text_fingerprint(self.pretrained, self.revision, parts, settings)
            self._holder[name] = TextCache(self.text_cache / fingerprint)
        cache: TextCache = self._holder[name]
        return cache

    # Painting

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
        positive, negative = _split(conditioning)
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
        reader: Callable[..., Any] = self.pipeline_class.lora_state_dict
        return reader

    def train_all(self) -> None:
        """Makes the whole loaded transformer trainable, in float32."""
        super().train_all()
        self._compute_dtype = torch.float32

    def decode(self, latents: Tensor) -> Tensor:
        """Through the VAE, to [0, 1]."""
        vae = self.pipeline.vae
        images: Tensor = vae.decode(self.unscale(latents).to(vae.dtype), return_dict=False)[0]
        return to_unit_range(images)

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


def check_settings(flow: DiffusersFlow) -> None:
    """Raises ConfigurationError for a setting out of its range; warns of those without an effect."""
    choices = {"text_encoders": get_args(TextEncoders), "quantization": (None, *get_args(Quantization))}
    for name, expected in choices.items():
        if (given := getattr(flow, name)) not in expected:
            raise ConfigurationError(f"flow.{name}: expected one of {', '.join(map(str, expected))}, got {given!r}")
    length, (least, largest) = flow.max_sequence_length, flow.sequence_range
    if not least <= length <= largest:
        raise ConfigurationError(
            f"flow.max_sequence_length: {type(flow).__name__} expected {least} to {largest} tokens, got {length}; "
            f"null takes {flow.sequence_length}"
        )
    if flow.revision is not None and is_folder(flow.pretrained):
        warnings.warn(
            f"flow.revision: {flow.revision} has no effect: {flow.pretrained} is a folder, not a model on the hub",
            stacklevel=2,
        )


def nearest_multiple(size: int, multiple: int) -> int:
    """Of what a size must be a multiple of, the nearest one, at least one.

    Example:
        >>> nearest_multiple(500, 16), nearest_multiple(3, 16)
        (496, 16)
    """
    return max(1, round(size / multiple)) * multiple


def _source(function: Any) -> str:
    """A function's text, where there is one: an adapter that is written anew encodes anew."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def _split(conditioning: Conditioning) -> tuple[Conditioning, Conditioning]:
    """The conditioning of prompts, and that of negative prompts under the same names."""
    positive = {n: t for n, t in conditioning.tensors.items() if not n.startswith("negative_")}
    negative = {n: conditioning.tensors[f"negative_{n}"] for n in positive if f"negative_{n}" in conditioning.tensors}
    return Conditioning(positive), Conditioning(negative)


def to_unit_range(images: Tensor) -> Tensor:
    """A VAE's images, in [-1, 1], to float32 in [0, 1]; what is not finite becomes NaN: clamped, it would be a colour.

    Example:
        >>> to_unit_range(torch.tensor([-2.0, 0.0, 1.0, torch.inf]))
        tensor([0.0000, 0.5000, 1.0000,    nan])
    """
    images = images.float()
    return torch.where(images.isfinite(), (images / 2 + 0.5).clamp(0, 1), torch.nan)


def dynamic_shift(config: Any, num_tokens: int) -> float:
    """The pipelines' mu: linear in the number of image tokens."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (num_tokens - config.base_image_seq_len))


def pack(latents: Tensor) -> Tensor:
    """[N, C, H, W] to tokens [N, H W / 4, 4 C], each of 2 x 2 latent pixels.

    Example:
        >>> pack(torch.zeros(1, 16, 4, 6)).shape
        torch.Size([1, 6, 64])
    """
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse of `pack`, for latents of height x width.

    Example:
        >>> latents = torch.arange(48.0).view(1, 2, 4, 6)
        >>> torch.equal(unpack(pack(latents), 4, 6), latents)
        True
    """
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, height // 2, width // 2), 2)
