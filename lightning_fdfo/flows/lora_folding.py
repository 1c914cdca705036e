"""A LoRA with its scale in its weights, so that it acts the same where its metadata is not read.

A scale is alpha / rank, and alpha stands in metadata that not every program reads. What is written has alpha = rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_fdfo.flows.lora_contents import PREFIX, layers_with, scale_in_file, settings_in
from lightning_fdfo.flows.lora_file import sort_metadata

METADATA = "lora_adapter_metadata"
"""Key of a file's header under which diffusers keeps PEFT's settings, as JSON."""


def folded(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Multiplies the scale of each layer into its B.

        B -> scale * B        alpha -> rank        scale = alpha / rank, or alpha / sqrt(rank) with rsLoRA

    That is exact for DoRA too, m * (W + scale * B A) / |W + scale * B A|: the magnitudes m stay as they are.

    Args:
        state: `LAYER.lora_A.weight` and so on, with or without `transformer.` before it.
        settings: PEFT's.

    Returns:
        State and settings, in which every layer's scale is 1.

    Example:
        >>> import torch
        >>> state = {"to_q.lora_A.weight": torch.ones(4, 8), "to_q.lora_B.weight": torch.ones(8, 4)}
        >>> weights, settings = folded(state, {"r": 4, "lora_alpha": 8, "use_rslora": False})
        >>> weights["to_q.lora_B.weight"][0], settings["lora_alpha"]
        (tensor([2., 2., 2., 2.]), 4)
    """
    ranks = {layer: state[name].shape[0] for layer, name in layers_with(state, "lora_A").items()}
    weights = dict(state)
    for name, value in state.items():
        layer, _, part = name.removeprefix(PREFIX).partition(".lora_B.")
        if part:
            weights[name] = (value.float() * scale_in_file(settings, layer, ranks[layer])).to(value.dtype)
    rank = settings.get("r", next(iter(ranks.values()), 0))
    unscaled = {"lora_alpha": rank, "use_rslora": False, "alpha_pattern": dict(settings.get("rank_pattern") or {})}
    return weights, {**settings, **unscaled}


def read_settings(file: Path) -> dict[str, Any]:
    """PEFT's settings in a file's header, as diffusers writes them; none without."""
    with safe_open(file, framework="pt") as content:
        settings: dict[str, Any] = json.loads((content.metadata() or {}).get(METADATA, "{}"))
    return settings


def fold_file(source: Path, target: Path) -> None:
    """Copies a LoRA file by diffusers, its scale folded into its weights; one without metadata has scale 1 already."""
    settings, state = read_settings(source), load_file(source)
    own = {name: value for name, value in settings.items() if name.startswith(PREFIX)}
    weights, unscaled = folded(state, settings_in(own))
    described = {**settings, **{f"{PREFIX}{name}": value for name, value in unscaled.items()}}
    if not own or described == settings:
        shutil.copyfile(source, target)
        return
    save_file(weights, target, {"format": "pt", METADATA: json.dumps(described, indent=2, sort_keys=True)})
    sort_metadata(target)
