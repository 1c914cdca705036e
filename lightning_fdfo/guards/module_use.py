"""Uses of a module in plain Python that cannot work, refused before any model is loaded."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.compile import to_uncompiled

from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.base import FlowModel

NO_SETTINGS = (
    "FDFOModule.load_from_checkpoint: a checkpoint holds what trains and no settings: build the module, and give the "
    "file to trainer.fit, validate, test or predict as ckpt_path"
)
COMPILED = (
    "torch.compile: FDFOModule cannot be compiled, for its steps sample, call rewards and log; give the Trainer the "
    "module itself"
)


def check_use(module: LightningModule) -> None:
    """Refuses a compiled module, and a trainer without prompts.

    Lightning puts compiled steps in the place of the module's own; they are put back, so that the module can be used.

    Raises:
        ConfigurationError: the message says what to do instead.
    """
    if module._compiler_ctx is not None:
        to_uncompiled(module)
        raise ConfigurationError(COMPILED)
    if module.trainer.datamodule is None:  # type: ignore[attr-defined]
        name = "fit" if module.trainer.state.fn is None else module.trainer.state.fn.value
        raise ConfigurationError(
            f"trainer.{name}: expected PromptDataModule(train, val) as its second argument, which "
            "reads files of prompts; lists of prompts and data loaders are not taken"
        )


def check_flow_is_new(flow: FlowModel) -> None:
    """Refuses a flow whose model is loaded before its module loads it: a LoRA of other settings may be bound to it.

    Raises:
        ConfigurationError: the message says what to do instead.
    """
    if hasattr(flow, "transformer"):
        name = type(flow).__name__
        raise ConfigurationError(
            f"flow: this {name} is loaded already, by another module, an attempt that failed, or its load(); give each "
            f"FDFOModule a new {name}(...)"
        )


def check_same_file(lora_file: Path | None, loaded: Path | None) -> None:
    """Raises ConfigurationError for a `lora_file` that is set once the model is loaded: it would have no effect."""
    if lora_file != loaded:
        raise ConfigurationError(
            "module.lora_file: it is read when the model is loaded, and this module's is loaded already; set it on "
            "a new module"
        )


def report_start(has_trained: bool, ckpt_path: object) -> None:
    """Reports a `fit` without `ckpt_path` from trained weights, as in a notebook's cell that is run again."""
    if has_trained and ckpt_path is None:
        rank_zero_info(
            "This fit begins from weights that an earlier fit or checkpoint has left in the module, with a new "
            "optimizer; to resume exactly give ckpt_path, to start from scratch build a new FDFOModule"
        )


def use_safe_checkpoints(trainer: Trainer) -> None:
    """Lets a trainer read and write checkpoints as the command does, unless it has a plugin for it.

    Lightning's own would run code that a checkpoint may hold.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = SafeCheckpointIO()
