"""PipelineSource: where a diffusers pipeline is, what it has and lacks, and how it is checked, loaded and quantised."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.finite import first_not_finite
from lightning_fdfo.flows.model_files import (
    CONFIGURATION,
    UNREADABLE,
    check_complete,
    check_parts,
    described,
    download_command,
    is_folder,
    meta_tensors,
    model_folder,
    read_index,
    resolve_pretrained,
    text_encoders,
)
from lightning_fdfo.flows.quantization import Quantization, quantization_config
from lightning_fdfo.hub import is_hub_error, is_hub_name, out_of_reach

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
"""How names of components begin that texts are encoded by."""


class PipelineSource:
    """A diffusers pipeline in a folder or on the hub; nothing is read before it is asked for.

    Args:
        pretrained: a shipped model, a folder or a hub name.
        revision: branch, tag or commit on the hub.
        dtype: of the weights.
        quantization: of the transformer.
        family: name of the class that loads it, for messages.
        serves: names of the pipeline classes that it can be.
        pipeline_class: the class itself, where diffusers has none of that name.

    Example:
        >>> source = PipelineSource("tiny-digits", family="StableDiffusion3", serves=["StableDiffusion3Pipeline"])
        >>> source.component_names("text_encoder")
        ['text_encoder', 'text_encoder_2', 'text_encoder_3']
        >>> source.absent_texts
        ['text_encoder_3', 'tokenizer_3']
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        quantization: Quantization | None = None,
        *,
        family: str,
        serves: Sequence[str],
        pipeline_class: type[Any] | None = None,
    ) -> None:
        self.pretrained = resolve_pretrained(pretrained)
        self.revision = revision
        self.dtype = dtype
        self.quantization = quantization
        self._family = family
        self._serves = tuple(serves)
        self._pipeline_class = pipeline_class

    # What is known without weights

    @cached_property
    def index(self) -> dict[str, Any]:
        """`model_index.json`.

        Raises:
            ConfigurationError: it cannot be had, or names a pipeline class that the family does not serve.
        """
        index = read_index(self.pretrained, self.revision)
        if index.get("_class_name") not in self._serves:
            raise ConfigurationError(
                f"flow.pretrained: {self.pretrained} holds a {index.get('_class_name')}, "
                f"{self._family} expected a {' or '.join(self._serves)}"
            )
        return index

    @property
    def pipeline_class(self) -> Any:
        """The class that `model_index.json` names."""
        return self._pipeline_class or getattr(diffusers, self.index["_class_name"])

    def component_names(self, *prefixes: str) -> list[str]:
        """Names of the pipeline's components that begin so, whether the folder has them or not."""
        parameters = inspect.signature(self.pipeline_class.__init__).parameters
        return [name for name in parameters if name.startswith(prefixes)]

    def modules(self, pipeline: Any, *prefixes: str) -> dict[str, nn.Module]:
        """A pipeline's components that begin so, of those that it has."""
        given = {name: getattr(pipeline, name) for name in self.component_names(*prefixes)}
        return {name: module for name, module in given.items() if module is not None}

    @property
    def absent_texts(self) -> list[str]:
        """Text encoders and tokenizers that the folder lacks, for which plain diffusers must be given None."""
        return [name for name in self._absent() if name.startswith(TEXT_COMPONENTS)]

    def _absent(self) -> list[str]:
        """Optional components that the folder lacks: diffusers wants them to be given as None."""
        names = []
        for name, parameter in inspect.signature(self.pipeline_class.__init__).parameters.items():
            given = self.index.get(name, [None, None])
            if isinstance(given, list) and given[0] is None and parameter.default in (parameter.empty, None):
                names.append(name)
        return [name for name in names if name not in ("self", "scheduler", "transformer", "vae")]

    def validate(self) -> None:
        """Raises ConfigurationError for a quantisation that cannot work, and a folder that lacks a component.

        A hub name is not asked for.
        """
        if self.revision is not None and is_folder(self.pretrained):
            warnings.warn(
                f"flow.revision: {self.revision} has no effect: {self.pretrained} is a folder, not a model on the hub",
                stacklevel=2,
            )
        if self.quantization is not None:
            quantization_config(self.quantization, self.dtype)
        if is_folder(self.pretrained) or not is_hub_name(self.pretrained):
            check_parts(self.index, Path(self.pretrained))

    # Loading

    def without_weights(self, *names: str) -> dict[str, nn.Module]:
        """Components by their configuration files, on the meta device."""
        folder = model_folder(self.pretrained, self.revision, CONFIGURATION)
        return {name: described(self.index, folder, name) for name in names}

    def outline(self) -> Any:
        """The pipeline by its configuration files: transformer and VAE have shapes alone, and there are no encoders."""
        folder = model_folder(self.pretrained, self.revision, CONFIGURATION)
        left_out = self.component_names(*TEXT_COMPONENTS, "image_encoder", "feature_extractor")
        with self._readable():
            components = self.without_weights("transformer", "vae")
            return self.pipeline_class.from_pretrained(str(folder), **components, **dict.fromkeys(left_out))

    def load(self, **components: Any) -> Any:
        """A pipeline with weights.

        Args:
            **components: those to take instead of the folder's; None leaves one out.

        Raises:
            ConfigurationError: it cannot be had or read, or its weights lack a tensor or are not finite.
        """
        common: dict[str, Any] = {"dtype": self.dtype}
        if not is_folder(self.pretrained):
            common["revision"] = self.revision
        options: dict[str, Any] = {**common, **dict.fromkeys(self._absent()), **components}
        if self.quantization is not None and "transformer" not in components:
            options["quantization_config"] = quantization_config(self.quantization, self.dtype)
        names = [name for name in self.component_names("text_encoder") if name not in options]
        with self._readable():
            options |= text_encoders(self.index, self.pretrained, names, **common)
            pipeline = self.pipeline_class.from_pretrained(self.pretrained, **options)
        for name in {"transformer", "vae"} - set(components):
            check_complete(self.pretrained, name, meta_tensors(getattr(pipeline, name)))
        pipeline.set_progress_bar_config(disable=True)
        self._check_weights(pipeline)
        return pipeline

    def _check_weights(self, pipeline: Any) -> None:
        """Raises ConfigurationError, with the tensor's name, if a weight is not finite: nothing could come of it."""
        for name, module in self.modules(pipeline, "text_encoder", "vae", "transformer").items():
            wrong = first_not_finite(dict(module.named_parameters()))
            if wrong is not None:
                raise ConfigurationError(
                    f"flow.pretrained: {self.pretrained}, read as {self.dtype}: {name}.{wrong}: the file is damaged "
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
        if on_hub and is_hub_error(error):
            what = f"flow.pretrained: {self.pretrained}: its files"
            return out_of_reach(error, self.pretrained, self.revision, what=what, command=command)
        hint = f"fetch it by: {command}" if on_hub else "download or save it again, all of it"
        why = " ".join(str(error).split()).split(" If you want")[0]  # diffusers' advice to load it nevertheless
        return f"flow.pretrained: {self.pretrained} is no model that can be read: {why}; {hint}"
