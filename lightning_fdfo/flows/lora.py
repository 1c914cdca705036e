"""LoRA: low-rank adapters on a transformer's linear layers, by PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.randomness import Stream, generator
from lightning_fdfo.settings import check_number


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the transformer's linear layers: W + scale * B A.

    Args:
        rank: >= 1; inner size of A and B.
        alpha: > 0; scale is alpha / rank.
        targets: names (or ends of names) of linear layers; None takes the flow's own, the attention projections.
        dropout: in [0, 1); share of a layer's inputs that A does not see in training. Rollouts see all. With it,
            `batch_size` and the number of devices change what is left out of which point.
        init: of A; B starts at 0, so that training starts from the base model. `gaussian`: normal, of deviation
            1 / rank; `kaiming`: uniform in ± 1 / sqrt(inputs), PEFT's default.
        dora: trains the magnitude of each output's weights apart from their direction (DoRA).
        rslora: scale is alpha / sqrt(rank) (rank-stabilised LoRA).
        init_lora: a diffusers LoRA file (.safetensors) to start from instead.

    Raises:
        ConfigurationError: a setting out of its range.

    Source: arXiv 2106.09685 (LoRA), 2402.09353 (DoRA), 2312.03732 (rsLoRA).
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    init: Literal["gaussian", "kaiming"] = "gaussian"
    dora: bool = False
    rslora: bool = False
    init_lora: str | None = None

    def __post_init__(self) -> None:
        check_number("lora.rank", self.rank, at_least=1)
        check_number("lora.alpha", self.alpha, above=0)
        check_number("lora.dropout", self.dropout, at_least=0, below=1)
        if self.targets is not None and not self.targets:
            raise ConfigurationError("lora.targets: expected at least one name, got none; leave it out for the default")

    @property
    def scale(self) -> float:
        """What B A is multiplied by.

        Example:
            >>> LoRA(rank=16, alpha=32).scale, LoRA(rank=16, alpha=32, rslora=True).scale
            (2.0, 8.0)
        """
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))


def target_layers(transformer: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that a LoRA binds, by name.

    Args:
        transformer: a model, which may be on the meta device.
        targets: names, or ends of names, of linear layers.

    Raises:
        ConfigurationError: a target matches no linear layer.

    Example:
        >>> list(target_layers(nn.ModuleDict({"to_q": nn.Linear(2, 3), "to_k": nn.Linear(2, 3)}), ["to_q"]))
        ['to_q']
    """
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    bound = {name: module for name, module in linear.items() if any(ends_in(name, target) for target in targets)}
    for target in targets:
        if not any(ends_in(name, target) for name in linear):
            endings = sorted({".".join(name.split(".")[-2:]) for name in linear if name not in bound})
            raise ConfigurationError(
                f"LoRA target {target!r} matches no linear layer of {type(transformer).__name__}; "
                f"layers not bound so far end in: {', '.join(endings)}"
            )
    return bound


def lora_numel(transformer: nn.Module, lora: LoRA, targets: Sequence[str]) -> int:
    """Weights that a LoRA trains: rank * (inputs + outputs) of each layer, and with DoRA its outputs.

    Example:
        >>> lora_numel(nn.ModuleDict({"to_q": nn.Linear(2, 3)}), LoRA(rank=2, dora=True), ["to_q"])
        13
    """
    layers = target_layers(transformer, targets).values()
    return sum(lora.rank * (one.in_features + one.out_features) + lora.dora * one.out_features for one in layers)


def check_rank(transformer: nn.Module, lora: LoRA, targets: Sequence[str]) -> None:
    """Refuses a rank above the width of every layer, which no change of weights has; warns if it is some layers'.

    Raises:
        ConfigurationError: the rank is above all widths, or a target matches no linear layer.

    Example:
        >>> check_rank(nn.ModuleDict({"to_q": nn.Linear(2, 3)}), LoRA(rank=2), ["to_q"])
    """
    layers = target_layers(transformer, targets)
    widths = {name: min(one.in_features, one.out_features) for name, one in layers.items()}
    narrow = [name for name, width in widths.items() if width < lora.rank]
    largest = max(widths.values())
    if len(narrow) == len(widths):
        raise ConfigurationError(
            f"lora.rank: expected at most {largest}, the smaller side of the largest layer that it binds, got "
            f"{lora.rank}: a change of such a layer has no higher rank; for all of it train without a LoRA (lora: null)"
        )
    if narrow:
        warnings.warn(
            f"lora.rank={lora.rank} is above the smaller side of {len(narrow)} of {len(widths)} layers that it binds "
            f"({narrow[0]}: {widths[narrow[0]]}): there it takes memory, and can do no more",
            stacklevel=2,
        )


def bind_lora(transformer: Any, lora: LoRA, targets: Sequence[str], seed: int) -> list[str]:
    """Adds a LoRA to a diffusers transformer and makes it the only thing that trains, in float32 and in eval mode.

    Args:
        transformer: a loaded model with PEFT support.
        lora: settings.
        targets: names, or ends of names, of linear layers.
        seed: the initial weights are a function of this.

    Returns:
        Names of the layers that it bound.

    Raises:
        ConfigurationError: a target matches no linear layer.
    """
    bound = list(target_layers(transformer, targets))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=bound,
        lora_dropout=lora.dropout,
        init_lora_weights=True if lora.init == "kaiming" else lora.init,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
    )
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(Stream.ADAPTER, seed).initial_seed())
        transformer.add_adapter(config)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if lora.dora:
        _set_magnitudes(transformer)
    elif not lora.dropout:  # DoRA's norms and dropout's factor are rounded to the input's dtype
        _leave_casts_to_autocast(transformer)
    transformer.eval()  # PEFT leaves its dropouts switched on
    return bound


def cast_unless_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A LoRA layer's input in its weights' dtype, or as it is where an autocast sees to that.

    PEFT's layers cast always: under bfloat16 autocast that is a float32 copy of the input, which is cast back at once.
    Without it the same bits come out. PEFT's bitsandbytes layers do the same as this.

    Args:
        x: [..., inputs]
        dtype: of the LoRA's weights.

    Example:
        >>> x = torch.ones(1, dtype=torch.bfloat16)
        >>> with torch.autocast("cpu"):
        ...     inside = cast_unless_autocast(x, torch.float32).dtype
        >>> inside, cast_unless_autocast(x, torch.float32).dtype
        (torch.bfloat16, torch.float32)
    """
    there = not x.is_meta  # the meta device has no autocast, and refuses the question
    return x if there and torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def _leave_casts_to_autocast(transformer: nn.Module) -> None:
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer._cast_input_dtype = cast_unless_autocast


@torch.no_grad()
def _set_magnitudes(transformer: nn.Module) -> None:
    """Makes DoRA start from the base model: PEFT rounds magnitudes to the base's dtype, here they are float32."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_magnitude_vector["default"].update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A["default"].weight,
                lora_B=layer.lora_B["default"].weight,
                scaling=layer.scaling["default"],
            )


def dropout_layers(transformer: nn.Module) -> list[nn.Module]:
    """The LoRA's dropouts: what training switches on and a rollout does not."""
    return [
        module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name
    ]


def ends_in(name: str, target: str) -> bool:
    """Whether a layer's name is a target, or ends in it.

    Example:
        >>> ends_in("blocks.0.attn.to_q", "attn.to_q"), ends_in("blocks.0.attn.to_q", "_q")
        (True, False)
    """
    return name == target or name.endswith("." + target)
