"""Loads a flow, and binds to it what trains: a new LoRA, the LoRA of a file, or the whole transformer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.lora import LoRA, dropout_layers
from lightning_fdfo.flows.lora_contents import check_lora_file, describe_lora
from lightning_fdfo.flows.lora_files import add_lora, adopt_lora, check_lora
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.training.summary import describe_model


def check_binding(flow: FlowModel, lora: LoRA | None, lora_file: Path | None) -> None:
    """Checks, before the model is loaded, that `bind` can do its work.

    Raises:
        ConfigurationError: the whole transformer cannot train, or a LoRA's file is not one of this model.
    """
    if lora is None:
        flow.check_trains_all()
    elif lora.init_lora is not None:
        check_lora_file(Path(lora.init_lora), "lora.init_lora")
        check_lora(flow, Path(lora.init_lora))
    if lora_file is not None:
        check_lora(flow, lora_file)


def cache_texts(flow: FlowModel, prompts: Sequence[Prompt], guidance_scale: float, trainer: Trainer) -> None:
    """Lets a flow encode a command's texts now, if it caches them."""
    with trainer.precision_plugin.forward_context():
        flow.prepare_texts(
            [prompt.text for prompt in prompts],
            [prompt.negative for prompt in prompts] if guidance_scale != 1.0 else [],
            trainer.strategy.root_device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            barrier=trainer.strategy.barrier,
        )


def load(flow: FlowModel, guidance_scale: float) -> None:
    """Loads a flow, and says in a line which.

    Raises:
        ConfigurationError: the model has no guidance, and a scale other than 1 is asked for.
    """
    rank_zero_info(describe_model(flow))
    flow.load()
    if flow.guidance == "none" and guidance_scale != 1.0:
        raise ConfigurationError(
            f"sampling.guidance_scale: expected 1, got {guidance_scale}: this model has no guidance"
        )
    # Eval mode is meant: rollout and training must see the same velocities.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")


def bind(flow: FlowModel, lora: LoRA | None, lora_file: Path | None, seed: int) -> Sequence[nn.Module]:
    """Makes a loaded flow ready to train, says in a line what does, and lets the flow compile.

    Args:
        flow: loaded, without a LoRA.
        lora: settings of a new LoRA; None trains the whole transformer.
        lora_file: a LoRA that takes the place of both, to validate, test or predict with.
        seed: of a new LoRA's start.

    Returns:
        The dropout layers of a new LoRA.
    """
    dropouts = _bind(flow, lora, lora_file, seed)
    flow.compile_transformer()
    return dropouts


def _bind(flow: FlowModel, lora: LoRA | None, lora_file: Path | None, seed: int) -> Sequence[nn.Module]:
    """The dropout layers of a new LoRA."""
    if lora_file is not None:
        adopted = adopt_lora(flow, lora_file)
        layers = describe_lora(flow.transformer, flow.lora_targets)
        rank_zero_info(f"LoRA of rank {adopted.rank} on {layers}, from {lora_file}")
        return []
    if lora is None:
        flow.train_all()
        return []
    bound = add_lora(flow, lora, seed)
    rank_zero_info(f"LoRA of rank {lora.rank} on {len(bound)} layers")
    return dropout_layers(flow.transformer)


def check_trainable(module: nn.Module) -> None:
    """Raises ConfigurationError if no weight of a loaded module trains."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigurationError(
            "the model has no weight that trains: expected a LoRA with targets (model.lora), or a flow whose train_all "
            "makes its transformer trainable"
        )
