"""Folds a LoRA's scale into its weights, so that it acts the same where its metadata is not read.

A scale is alpha / rank, and alpha stands in metadata that not every program reads. What is written has alpha = rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_fdfo.flows.lora_contents import PREFIX, layers_with, scale_in_file


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
