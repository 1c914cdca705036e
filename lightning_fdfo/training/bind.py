"""What trains on a flow: the LoRA of the settings, the LoRA of a file, or the whole transformer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.lora import LoRA, dropout_layers
from lightning_fdfo.flows.lora_contents import check_lora_file, describe_lora
from lightning_fdfo.flows.lora_files import add_lora, adopt_lora, check_lora


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


def bind(flow: FlowModel, lora: LoRA | None, lora_file: Path | None, seed: int) -> Sequence[nn.Module]:
    """Makes a loaded flow ready to train, and says in a line what does.

    Args:
        flow: loaded, without a LoRA.
        lora: settings of a new LoRA; None trains the whole transformer.
        lora_file: a LoRA that takes the place of both, to validate, test or predict with.
        seed: of a new LoRA's start.

    Returns:
        The dropout layers of a new LoRA.
    """
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
