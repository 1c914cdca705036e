"""Uses of a module in plain Python that cannot work, refused before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.compile import to_uncompiled

from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.algorithm import Algorithm
from lightning_fdfo.settings import Objective, check_number

NO_SETTINGS = (
    "FDFOModule.load_from_checkpoint: a checkpoint holds what trains and no settings: build the module, and give the "
    "file to trainer.fit, validate, test or predict as ckpt_path"
)
COMPILED = (
    "torch.compile: FDFOModule cannot be compiled, for its steps sample, call rewards and log; give the Trainer the "
    "module itself"
)


def check_arguments(
    objective: Objective, lora: LoRA | None, seed: int, algorithm: Algorithm | None, terms: Mapping[str, RewardTerm]
) -> None:
    """Raises ConfigurationError for arguments that do not go together, and for a seed that is none."""
    bounds = {"reward_scale": objective.reward_scale != "none", "reward_clip": objective.reward_clip is not None}
    of_differences = [f"objective.{name}" for name, is_set in bounds.items() if is_set]
    if algorithm is not None:
        idle = of_differences + [
            f"rewards.{term}.{key}"
            for term, one in terms.items()
            for key in ("clip", "gate", "gradient")
            if getattr(one, key)
        ]
        if idle:
            raise ConfigurationError(
                f"model.algorithm: {', '.join(idle)} would have no effect with {type(algorithm).__name__}: FDFO alone "
                "trains by the differences of pairs; leave them out"
            )
    elif of_differences and all(term.gradient or term.is_watched for term in terms.values()):
        raise ConfigurationError(
            f"{' and '.join(of_differences)} would have no effect: every reward that trains does so by its gradient, "
            "and there is no difference of pairs to scale or to clip; leave it out"
        )
    if objective.kl_weight and lora is None:
        raise ConfigurationError("kl_weight needs the base model beside the trained one: use a LoRA, or 0")
    check_number("seed", seed, at_least=0)


class Unsupported(LightningModule):
    """Methods of every LightningModule that could not do here what they say."""

    @classmethod
    def load_from_checkpoint(cls, *_: Any, **__: Any) -> NoReturn:
        """Raises ConfigurationError: a checkpoint holds what trains, and no settings to build a module of."""
        raise ConfigurationError(NO_SETTINGS)

    def compile(self, *_: Any, **__: Any) -> NoReturn:
        """Raises ConfigurationError: it would have no effect, for the Trainer calls the steps and never the module."""
        raise ConfigurationError(COMPILED)


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


def use_safe_checkpoints(trainer: Trainer) -> None:
    """Lets a trainer read and write checkpoints as the command does, unless it has a plugin for it.

    Lightning's own would run code that a checkpoint may hold.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = SafeCheckpointIO()
