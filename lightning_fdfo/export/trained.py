"""Converts what a run has trained to diffusers' own formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.finite import check_finite_checkpoint, first_not_finite
from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_contents import check_lora_file
from lightning_fdfo.flows.lora_files import LORA_FILE, add_lora, fold_file, save_lora
from lightning_fdfo.training.trained_state import check_weights, shapes, trainable

PREFIX = "flow.transformer."
"""Of a checkpoint's names: where the module keeps the transformer."""


def flow_of(config: Mapping[str, Any]) -> DiffusersFlow:
    """The run's flow model, not loaded; raises ConfigurationError if its configuration names none of diffusers'."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FlowModel, "flow")
    try:
        flow = parser.instantiate_classes(parser.parse_object({"flow": (config.get("model") or {}).get("flow")})).flow
    except ArgumentError as error:
        raise ConfigurationError(f"config.yaml: model.flow: {error}") from error
    if not isinstance(flow, DiffusersFlow):
        raise ConfigurationError(f"config.yaml: expected a flow on a diffusers pipeline, got {type(flow).__name__}")
    return flow


def write_lora(
    flow: DiffusersFlow, run: Path, config: Mapping[str, Any], checkpoint: Path | None, folder: Path
) -> None:
    """Writes the LoRA that the run has left at its end, or that of a checkpoint, into a folder.

    Raises:
        ConfigurationError: there is none, or the checkpoint is of another configuration.
    """
    if checkpoint is None:
        file = run / "lora" / LORA_FILE
        if not file.is_file():
            raise ConfigurationError(
                f"{file} is not there: the run has not ended, or had no LoRAExport; name a checkpoint by --ckpt_path"
            )
        check_lora_file(file, "export")
        fold_file(file, folder / LORA_FILE)
        return
    weights = trained_weights(checkpoint)
    flow.load()
    add_lora(flow, LoRA(**config["model"]["lora"]), seed=0)
    _fill(flow, weights)
    save_lora(flow, folder)


def write_pipeline(flow: DiffusersFlow, lora: Path | None, checkpoint: Path | None, folder: Path) -> None:
    """Writes the whole pipeline, which plain diffusers loads.

    Args:
        flow: not loaded.
        lora: a folder with a LoRA, which is merged into the transformer; or None:
        checkpoint: of a run that trained the whole transformer.
        folder: an empty one.
    """
    if flow.quantization is not None:
        raise ConfigurationError("--merge: a LoRA cannot be merged into quantised weights: export the LoRA alone")
    pipeline = flow.load_pipeline()
    if lora is not None:
        pipeline.load_lora_weights(lora)
        pipeline.fuse_lora(components=["transformer"])
        pipeline.unload_lora_weights()
        wrong = first_not_finite(dict(pipeline.transformer.named_parameters()))
        if wrong is not None:
            raise ConfigurationError(f"--merge: the merged weights are beyond the range of flow.dtype: {wrong}")
    elif checkpoint is not None:
        flow.transformer = pipeline.transformer.requires_grad_(True)
        _fill(flow, trained_weights(checkpoint))
    pipeline.save_pretrained(folder)


def trained_weights(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's weights, by their names in the module; their average if it holds one."""
    saved = SafeCheckpointIO().load_checkpoint(checkpoint)
    averages = [state["average"] for state in saved.get("callbacks", {}).values() if "average" in state]
    weights: dict[str, Tensor] = averages[0] if averages and averages[0] else saved["state_dict"]
    check_finite_checkpoint(weights, "weights")
    return weights


@torch.no_grad()
def _fill(flow: DiffusersFlow, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into those that train, each of which must be there."""
    own = {PREFIX + name: parameter for name, parameter in trainable(flow.transformer).items()}
    check_weights(shapes(weights), shapes(own))
    for name, parameter in own.items():
        parameter.copy_(weights[name])
