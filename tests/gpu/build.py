"""Models of random weights at full size, or a few layers of the same classes, from configurations in `models/`.

Folders in diffusers' own format, so that a run loads them as it loads the real ones: nothing is asked of a hub.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from lightning_fdfo.files import atomic_folder
from tests.flows.tiny_tokenizers import clip_tokenizer, t5_tokenizer

TOKENIZERS = {"CLIPTokenizer": clip_tokenizer, "T5Tokenizer": t5_tokenizer}
"""They know few words; their numbers are below any encoder's number of words."""


def components(model: str, toy: bool = False, t5_layers: int | None = None) -> dict[str, tuple[str, dict[str, Any]]]:
    """The parts of a pipeline: name -> (class with its library, configuration).

    Args:
        model: `sd35_medium` or `flux_dev`.
        toy: a few narrow layers.
        t5_layers: fewer than T5's own, for less memory and disk; what it gives is as wide.
    """
    found = {}
    for name, part in _read(model)["components"].items():
        config = part.get("config", {}) | (part.get("toy", {}) if toy else {})
        if "T5Encoder" in part["class"] and t5_layers:
            config |= {"num_layers": t5_layers}
        if "CLIPText" in part["class"]:  # it pools where the text ends
            clip = clip_tokenizer()
            config |= {key: getattr(clip, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        found[name] = (part["class"], config)
    return found


def write_model(
    model: str, folder: Path, toy: bool = False, t5_layers: int | None = None, weights: bool = True
) -> Path:
    """Writes a pipeline in bfloat16, one part after the other, unless the folder is there.

    Args:
        model: as in `components`.
        folder: where to.
        toy: as in `components`.
        t5_layers: as in `components`.
        weights: False leaves the weights out: the folder then says what the model is, and cannot be loaded.
    """
    if folder.exists():
        return folder
    with atomic_folder(folder) as partial:
        index: dict[str, Any] = {"_class_name": _read(model)["pipeline"], "_diffusers_version": diffusers.__version__}
        for number, (name, (class_path, config)) in enumerate(components(model, toy, t5_layers).items()):
            library, _, class_name = class_path.partition(".")
            index[name] = [library, class_name]
            if class_name in TOKENIZERS:
                TOKENIZERS[class_name]().save_pretrained(partial / name)
                continue
            part = empty(class_path, config, tables=weights)
            if isinstance(part, nn.Module) and not weights:
                (part.save_config if library == "diffusers" else part.config.save_pretrained)(partial / name)
                continue
            if isinstance(part, nn.Module):
                fill(part, seed=number)
            part.save_pretrained(partial / name)
        (partial / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def empty(class_path: str, config: Mapping[str, Any], tables: bool = False) -> Any:
    """A part of a pipeline, whose weights take no memory.

    Args:
        class_path: its class, after its library.
        config: its configuration.
        tables: whether to compute the tables that the class stores beside its weights.
    """
    library, _, class_name = class_path.partition(".")
    build = getattr(importlib.import_module(library), class_name)
    with init_empty_weights(include_buffers=False) if tables else torch.device("meta"):
        return build(**config) if library == "diffusers" else build(build.config_class(**config))


def fill(module: nn.Module, seed: int) -> None:
    """Gives a module memory in bfloat16: normal matrices of deviation 1 / sqrt(inputs), gains of 1, small biases.

    Each has numbers of its own, whatever the number of threads that draw them.
    """

    def draw(number: int, owner: nn.Module, name: str, parameter: nn.Parameter) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        inputs = parameter[0].numel() if parameter.ndim > 1 else 2500
        values = torch.empty(parameter.shape).normal_(std=inputs**-0.5, generator=generator)
        values += float(parameter.ndim < 2 and name != "bias")
        owner.register_parameter(name, nn.Parameter(values.bfloat16(), requires_grad=False))

    found = [(owner, name, p) for owner in module.modules() for name, p in owner.named_parameters(recurse=False)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda item: draw(item[0], *item[1]), enumerate(found)))
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.bfloat16() if buffer.is_floating_point() else buffer)
    if hasattr(module, "tie_weights"):
        module.tie_weights()


def _read(model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / f"models/{model}.json").read_text(encoding="utf-8"))
    return found
