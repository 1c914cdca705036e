"""Where a flow's text encoders are, and when they encode: `flow.text_encoders` is resident, offloaded or cached.

keep      Resident    they stay on the device
offload   Offloaded   they are on the device only while texts are encoded
cache     Cached      they encode all texts before training, into files, and are freed
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.pipeline_source import TEXT_COMPONENTS, PipelineSource
from lightning_fdfo.flows.text_cache import TextCache, text_fingerprint

TextEncoders = Literal["offload", "keep", "cache"]
TEXTS_A_SHARD = 32
"""Texts that are encoded, and written to the cache, at once."""


class EncodesTexts(Protocol):
    """What a text encoding asks of its flow."""

    source: PipelineSource
    max_sequence_length: int

    @property
    def pipeline(self) -> Any:
        """The loaded pipeline."""

    def load_pipeline(self, **components: Any) -> Any:
        """Another pipeline, with some components given."""

    def encode_texts(
        self, pipeline: Any, texts: list[str], device: torch.device, negative: bool
    ) -> Mapping[str, Tensor]:
        """Texts to named tensors, a row each."""


class TextEncoding(ABC):
    """Encodes a flow's texts on the device that `to_device` has named.

    Args:
        flow: whose texts it encodes.
    """

    needs_encoders: ClassVar[bool] = True
    """Whether the flow's own pipeline is loaded with its text encoders."""

    def __init__(self, flow: EncodesTexts) -> None:
        self._flow = flow
        self._device = torch.device("cpu")

    @abstractmethod
    def to_device(self, device: torch.device) -> None:
        """Texts are encoded on `device` from now on."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """While it is open, `encode` works."""
        yield

    def encode(self, texts: Sequence[str], negative: bool) -> Mapping[str, Tensor]:
        """Named tensors on the device, a row a text.

        Args:
            texts: N texts.
            negative: whether they are negative prompts.
        """
        return self._flow.encode_texts(self._flow.pipeline, list(texts), self._device, negative)

    def prepare(  # noqa: B027 - only a cache has something to prepare
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        device: torch.device,
        *,
        rank: int,
        world_size: int,
        barrier: Callable[[], object],
    ) -> None:
        """Called with all texts of a run, before its model is loaded; see `FlowModel.prepare_texts`."""

    def _move(self, pipeline: Any, device: torch.device) -> None:
        for module in self._flow.source.modules(pipeline, "text_encoder").values():
            module.to(device)


class Resident(TextEncoding):
    """Text encoders stay on the device: the fastest way, where they fit beside the rest."""

    def to_device(self, device: torch.device) -> None:
        """Moves them there."""
        self._device = device
        self._move(self._flow.pipeline, device)


class Offloaded(TextEncoding):
    """Text encoders wait on the CPU, and are on the device only while texts are encoded."""

    def to_device(self, device: torch.device) -> None:
        """Notes where they are to go."""
        self._device = device

    @contextmanager
    def open(self) -> Iterator[None]:
        """Moves them to the device, and back at the end."""
        self._move(self._flow.pipeline, self._device)
        try:
            yield
        finally:
            self._move(self._flow.pipeline, torch.device("cpu"))


class Cached(TextEncoding):
    """Texts are encoded once, into files, by encoders that are loaded for that alone, and then freed.

    A text that is not in the files when it is asked for is encoded then.

    Args:
        flow: whose texts it encodes.
        folder: of the caches; each has a sub-folder, named by what its tensors depend on.
    """

    needs_encoders = False

    def __init__(self, flow: EncodesTexts, folder: Path) -> None:
        super().__init__(flow)
        self._folder = folder
        self._caches: dict[tuple[str, ...], TextCache] = {}
        self._encoders: Any = None
        """A pipeline with text encoders on the device, and neither transformer nor VAE; None while it is not needed."""

    def to_device(self, device: torch.device) -> None:
        """Notes where tensors are to go."""
        self._device = device

    def encode(self, texts: Sequence[str], negative: bool) -> Mapping[str, Tensor]:
        """From the files; what they lack is encoded first."""
        self._fill(texts, negative)
        return self._cache(negative).read(texts).to(self._device).tensors

    def prepare(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        device: torch.device,
        *,
        rank: int,
        world_size: int,
        barrier: Callable[[], object],
    ) -> None:
        """Encodes what the files lack: each process its share, then what is still missing; and frees the encoders.

        Raises:
            ConfigurationError: the files cannot be written.
        """
        self._device = device
        share = slice(rank, None, world_size)
        with suppress(ConfigurationError):  # every process meets it again below; here the others wait for this one
            self._fill(prompts[share], negative=False)
            self._fill(negative_prompts[share], negative=True)
            self._encoders = None
        barrier()
        self._fill(prompts, negative=False)
        self._fill(negative_prompts, negative=True)
        self._encoders = None

    @torch.no_grad()
    def _fill(self, texts: Sequence[str], negative: bool) -> None:
        cache = self._cache(negative)
        missing = cache.missing(texts)
        for start in range(0, len(missing), TEXTS_A_SHARD):
            chunk = missing[start : start + TEXTS_A_SHARD]
            tensors = self._flow.encode_texts(self._pipeline(), chunk, self._device, negative)
            cache.write(chunk, Conditioning(tensors))

    def _pipeline(self) -> Any:
        if self._encoders is None:
            pipeline = self._flow.load_pipeline(**self._flow.source.without_weights("transformer", "vae"))
            self._move(pipeline, self._device)
            self._encoders = pipeline
        return self._encoders

    def _cache(self, negative: bool) -> TextCache:
        """The cache of what is encoded with the present settings, autocast among them."""
        flow, kind = self._flow, self._device.type
        source, family = flow.source, type(flow)
        autocast = str(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        settings = (
            f"{family.__module__}.{family.__qualname__}",
            _code(flow.encode_texts),
            str(source.dtype),
            autocast,
            str(flow.max_sequence_length),
            str(negative),
        )
        if settings not in self._caches:
            names = source.component_names(*TEXT_COMPONENTS)
            fingerprint = text_fingerprint(source.pretrained, source.revision, names, settings)
            self._caches[settings] = TextCache(self._folder / fingerprint)
        return self._caches[settings]


def _code(function: Any) -> str:
    """A function's text, where there is one: a model family that is written anew encodes anew."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
