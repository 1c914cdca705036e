"""LoRA: low-rank adapters on a transformer's linear layers, by PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.randomness import Stream, generator


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the transformer's linear layers: W + scale * B A.

    Args:
        rank: >= 1; inner size of A and B.
        alpha: > 0; scale is alpha / rank.
        targets: names (or ends of names) of linear layers; None takes the adapter's own, the attention projections.
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

    def check(self) -> None:
        """Raises ConfigurationError for a setting out of its range."""
        if not (self.rank >= 1 and 0 < self.alpha < math.inf and 0 <= self.dropout < 1):
            raise ConfigurationError(f"lora: expected rank >= 1, alpha > 0 and 0 <= dropout < 1, got {self}")
        if self.targets is not None and not self.targets:
            raise ConfigurationError("lora.targets: expected at least one name, got none; leave it out for the default")

    def check_file(self) -> None:
        """Raises ConfigurationError if there is an `init_lora` that is no safetensors file; reads its header alone."""
        if self.init_lora is not None:
            check_lora_file(Path(self.init_lora), "lora.init_lora")

    @property
    def scale(self) -> float:
        """What B A is multiplied by.

        Example:
            >>> LoRA(rank=16, alpha=32).scale, LoRA(rank=16, alpha=32, rslora=True).scale
            (2.0, 8.0)
        """
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))


def check_lora_file(file: Path, option: str) -> None:
    """Raises ConfigurationError, with the option's name, if a file is no safetensors file; reads its header alone."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"{option}: expected a .safetensors file by diffusers' save_lora_weights, got {file}: {error}"
        ) from error


def lora_in_file(state: Mapping[str, Tensor], metadata: Mapping[str, Any], file: Path) -> LoRA:
    """The settings of the LoRA that a file holds.

    Args:
        state: the file's, as `fill_lora` takes it.
        metadata: the file's.
        file: for messages.

    Raises:
        ConfigurationError: there is no LoRA in it, or one of several ranks.

    Example:
        >>> parts = {"lora_A": torch.ones(4, 8), "lora_B": torch.ones(8, 4)}
        >>> state = {f"transformer.to_q.{part}.weight": value for part, value in parts.items()}
        >>> found = lora_in_file(state, {"lora_alpha": 2}, Path("mine.safetensors"))
        >>> found.rank, found.alpha, found.targets
        (4, 2, ('to_q',))
    """
    ending = ".lora_A.weight"
    ranks = {
        name.removeprefix("transformer.").removesuffix(ending): value.shape[0]
        for name, value in state.items()
        if name.endswith(ending)
    }
    if len(set(ranks.values())) != 1:
        found = f"of the ranks {sorted(set(ranks.values()))}" if ranks else "none"
        raise ConfigurationError(f"LoRA {file}: expected one of one rank for the transformer, got {found}")
    settings = {name.removeprefix("transformer."): value for name, value in metadata.items()}
    rank = next(iter(ranks.values()))
    return LoRA(
        rank=rank,
        alpha=settings.get("lora_alpha", rank),
        targets=tuple(ranks),
        dora=any(".lora_magnitude_vector" in name for name in state),
        rslora=settings.get("use_rslora", False),
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
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    bound = [name for name in linear if any(_ends(name, target) for target in targets)]
    for target in targets:
        if not any(_ends(name, target) for name in linear):
            endings = sorted({".".join(name.split(".")[-2:]) for name in linear if name not in bound})
            raise ConfigurationError(
                f"LoRA target {target!r} matches no linear layer of {type(transformer).__name__}; "
                f"layers not bound so far end in: {', '.join(endings)}"
            )
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
    transformer.eval()  # PEFT leaves its dropouts switched on
    return bound


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


def fill_lora(transformer: Any, state: Mapping[str, Tensor], metadata: Mapping[str, Any], file: Path) -> None:
    """Copies a LoRA file's weights into the LoRA that a transformer has, scaled so that they do what they did.

    Args:
        transformer: with a LoRA by `bind_lora`.
        state: the file's, as diffusers reads it: `transformer.LAYER.lora_A.weight` and so on.
        metadata: the file's, with its alpha; without it the scale is 1, as diffusers has it.
        file: for messages.

    Raises:
        ConfigurationError: other layers or another rank than the LoRA's, or weights beside the transformer's.
    """
    prefix = "transformer."
    foreign = sorted({name.split(".")[0] for name in state if not name.startswith(prefix)})
    if foreign:
        raise ConfigurationError(
            f"LoRA {file} holds weights named {', '.join(f'{name}.…' for name in foreign)}, expected "
            "transformer.… alone; save it again by diffusers' save_lora_weights, without text encoders"
        )
    given = {name.removeprefix(prefix): value for name, value in state.items()}
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
    settings = {name.removeprefix(prefix): value for name, value in metadata.items()}
    for name, value in given.items():
        layer, _, part = name.partition(".lora_B.")
        given[name] = value.float() * (_scale_in_file(settings, layer, rank) / scale if part else 1)
    set_peft_model_state_dict(transformer, given)


def _scale_in_file(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    alphas = settings.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, layer), settings.get("lora_alpha", rank))
    return LoRA(rank=rank, alpha=alpha, rslora=settings.get("use_rslora", False)).scale


def dropout_layers(transformer: nn.Module) -> list[nn.Module]:
    """The LoRA's dropouts: what training switches on and a rollout does not."""
    return [
        module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name
    ]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
