"""LoRA files: what is in one, whether it can be used, and its weights in a bound LoRA.

A file's strength is alpha / rank of its own metadata, and 1 without; what is filled in acts as it does in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.finite import first_not_finite
from lightning_fdfo.flows.lora import LoRA, ends_in

PREFIX = "transformer."
"""Of the names in a file."""
KOHYA = re.compile(r"\.(lora_down|lora_up|hada_|lokr_|dora_scale)")
"""In the names of other trainers' formats."""
MAX_NAMED = 3
"""Layers that a message names."""


# Whether a file can be used


def check_lora_file(file: Path, option: str) -> None:
    """Raises ConfigurationError, with the option's name, unless a file is a safetensors file of finite numbers."""
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - not a mapping
                wrong = first_not_finite({name: content.get_tensor(name)})
                if wrong is not None:
                    raise ConfigurationError(
                        f"{option}: {file}: {wrong}: the run that wrote it had diverged, or the file is damaged; take "
                        "an earlier one"
                    )
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"{option}: expected a .safetensors file by diffusers' save_lora_weights, got {file}: {error}"
        ) from error


def lora_in_file(state: Mapping[str, Tensor], metadata: Mapping[str, Any], file: Path) -> LoRA:
    """The settings of the LoRA that a file holds.

    Args:
        state: the file's, as `copy_into_lora` takes it.
        metadata: the file's.
        file: for messages.

    Raises:
        ConfigurationError: there is no LoRA in it, one of several ranks, or one whose A or B is missing somewhere.

    Example:
        >>> import torch
        >>> parts = {"lora_A": torch.ones(4, 8), "lora_B": torch.ones(8, 4)}
        >>> state = {f"transformer.to_q.{part}.weight": value for part, value in parts.items()}
        >>> found = lora_in_file(state, {"lora_alpha": 2}, Path("mine.safetensors"))
        >>> found.rank, found.alpha, found.targets
        (4, 2, ('to_q',))
    """
    parts = {part: layers_with(state, part) for part in ("lora_A", "lora_B", "lora_magnitude_vector")}
    ranks = {layer: state[name].shape[0] for layer, name in parts["lora_A"].items()}
    dora = bool(parts["lora_magnitude_vector"])
    if not ranks:
        raise ConfigurationError(f"LoRA {file}: {_found_instead(state)}")
    for part, layers in parts.items():
        lacking = sorted({layer for others in parts.values() for layer in others} - set(layers))
        if lacking and (dora or part != "lora_magnitude_vector"):
            raise ConfigurationError(f"LoRA {file} is not complete: it has no {part} for {_named(lacking)}")
    if len(set(ranks.values())) != 1:
        raise ConfigurationError(
            f"LoRA {file}: expected one of one rank for the transformer, got of the ranks {sorted(set(ranks.values()))}"
        )
    settings = settings_in(metadata)
    rank = next(iter(ranks.values()))
    try:
        alpha = settings.get("lora_alpha", rank)
        return LoRA(rank, alpha, tuple(ranks), dora=dora, rslora=settings.get("use_rslora", False))
    except ConfigurationError as error:
        raise ConfigurationError(f"LoRA {file}: its metadata makes no sense: {error}") from error


def check_layers(transformer: nn.Module, state: Mapping[str, Tensor], metadata: Mapping[str, Any], file: Path) -> None:
    """Raises ConfigurationError if a file lacks layers of a transformer that its own metadata names as targets.

    Args:
        transformer: loaded, without a LoRA.
        state: the file's, as `copy_into_lora` takes it.
        metadata: the file's; without targets in it nothing can be known.
        file: for messages.
    """
    settings = settings_in(metadata)
    targets = settings.get("target_modules") or []
    if settings.get("exclude_modules") or settings.get("layers_to_transform"):
        return

    def is_target(name: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(ends_in(name, target) for target in targets)

    named = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear) and is_target(name)]
    found = layers_with(state, "lora_A")
    lacking = [name for name in named if name not in found]
    if lacking:
        raise ConfigurationError(
            f"LoRA {file} is not complete: its metadata names {len(named)} layers of this transformer, and it has "
            f"weights for {len(named) - len(lacking)}; missing: {_named(lacking)}"
        )


def describe_lora(transformer: nn.Module, defaults: Sequence[str]) -> str:
    """How many of the layers that LoRA binds by default have one, and which have none.

    Args:
        transformer: with a LoRA.
        defaults: the flow's `lora_targets`.
    """
    bound = {name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in bound | linear if any(ends_in(name, target) for target in defaults)}
    lacking = sorted(expected - bound)
    others = f" and {len(bound - expected)} others" if bound - expected else ""
    counted = f"{len(expected & bound)} of {len(expected)} layers{others}"
    return f"{counted}, none on {_named(lacking)}" if lacking else counted


def _found_instead(state: Mapping[str, Tensor]) -> str:
    """A sentence about a file without a LoRA for the transformer that can be read."""
    expected = "expected transformer.LAYER.lora_A.weight and transformer.LAYER.lora_B.weight"
    foreign = [name for name in state if KOHYA.search(name)]
    if foreign:
        return (
            f"{expected}, found {len(foreign)} weights with names of kohya's format, first {foreign[0]}, which "
            "diffusers does not convert for this model; rename lora_down to lora_A, lora_up times alpha / rank to "
            "lora_B, and each layer to what diffusers' transformer calls it"
        )
    return f"{expected}, found {f'{len(state)} weights, first {next(iter(state))}' if state else 'no weights'}"


def layers_with(state: Mapping[str, Tensor], part: str) -> dict[str, str]:
    """Layer -> name of its part, of those that have it."""
    return {
        name.removeprefix(PREFIX).partition(f".{part}")[0]: name
        for name in state
        if name.endswith((f".{part}.weight", f".{part}"))
    }


def _named(layers: Sequence[str]) -> str:
    more = f" and {len(layers) - MAX_NAMED} more" if len(layers) > MAX_NAMED else ""
    return ", ".join(layers[:MAX_NAMED]) + more


def settings_in(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings, of the transformer."""
    return {name.removeprefix(PREFIX): value for name, value in metadata.items()}


# Between files and a bound LoRA


def copy_into_lora(transformer: Any, state: Mapping[str, Tensor], metadata: Mapping[str, Any], file: Path) -> None:
    """Copies a LoRA file's weights into the LoRA that a transformer has, scaled so that they do what they did.

    Args:
        transformer: with a LoRA by `bind_lora`.
        state: the file's, as diffusers reads it: `transformer.LAYER.lora_A.weight` and so on.
        metadata: the file's, with its alpha; without it the scale is 1, as diffusers has it.
        file: for messages.

    Raises:
        ConfigurationError: other layers or another rank than the LoRA's, or weights beside the transformer's.
    """
    foreign = sorted({name.split(".")[0] for name in state if not name.startswith(PREFIX)})
    if foreign:
        raise ConfigurationError(
            f"LoRA {file} holds weights named {', '.join(f'{name}.…' for name in foreign)}, expected "
            "transformer.… alone; save it again by diffusers' save_lora_weights, without text encoders"
        )
    given = {name.removeprefix(PREFIX): value for name, value in state.items()}
    own = get_peft_model_state_dict(transformer)
    config = transformer.peft_config["default"]
    rank, scale = config.r, LoRA(rank=config.r, alpha=config.lora_alpha, rslora=config.use_rslora).scale
    for name in sorted(set(given) | set(own)):
        if name not in own or name not in given or own[name].shape != given[name].shape:
            has, needs = (tuple(names[name].shape) if name in names else "nothing" for names in (given, own))
            raise ConfigurationError(
                f"LoRA {file} does not fit the LoRA of rank {rank}: it has {has} for {name}, "
                f"expected {needs}; set lora.rank, lora.targets and lora.dora as it was trained"
            )
    wrong = first_not_finite(given)
    if wrong is not None:
        raise ConfigurationError(f"LoRA {file}: {wrong}")
    settings = settings_in(metadata)
    for name, value in given.items():
        layer, _, part = name.partition(".lora_B.")
        in_file = scale_in_file(settings, layer, rank) if part else scale
        given[name] = value.float() if in_file == scale else value.float() * in_file / scale
    set_peft_model_state_dict(transformer, given)


def scale_in_file(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """What a layer's B A is multiplied by; raises ConfigurationError for an alpha that is no finite number."""
    alphas = settings.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, layer), settings.get("lora_alpha", rank))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ConfigurationError(f"LoRA: expected a finite alpha for {layer}, the metadata says {alpha}")
    return alpha / (rank**0.5 if settings.get("use_rslora", False) else rank)
