"""Trainer, model and data from a configuration: if a class refuses its arguments, one line says which key named it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateMonitor,
    ProgressBar,
    ThroughputMonitor,
)
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info

from lightning_fdfo.commands.configuration.sentences import near
from lightning_fdfo.errors import ConfigurationError

MAX_SEED = 2**32 - 1
"""That numpy's global generator takes."""
NEEDS_LOGGER = (DeviceStatsMonitor, LearningRateMonitor, ThroughputMonitor)
"""Callbacks of Lightning's that refuse to run without a logger."""
BAREBONES = (
    "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps",
    "log_every_n_steps",
)  # fmt: skip
"""Settings of the Trainer's that `barebones` sets, and allows nobody else to name."""


class Builder:
    """Builds classes for the parser, and keeps the first error: the parser may bury it among those of other types.

    Args:
        config: what is built, to find the key that names a class.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.failure: tuple[type, Exception] | None = None

    def __call__(self, kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An instance."""
        try:
            return kind(*args, **kwargs)
        except Exception as error:
            if self.failure is None and isinstance(kind, type):
                self.failure = kind, error
            raise

    @contextmanager
    def in_one_line(self) -> Iterator[None]:
        """Turns what a class has raised into one line.

        Raises:
            ConfigurationError: names key and class, unless the class has found its own words.
        """
        try:
            yield
        except Exception as error:
            if self.failure is None:
                raise
            kind, first = self.failure
            if isinstance(first, ConfigurationError):
                raise first from error
            if issubclass(kind, LightningModule | LightningDataModule):  # ours: a bug
                raise
            command = self.config.get("subcommand")
            key = next(keys_of(kind, self.config.get(command, {}) if command else self.config), "")
            raise ConfigurationError(f"{f'{key}: ' if key else ''}{kind.__name__}: {reason(first)}") from first


def refusal(error: Exception, trainer: Mapping[str, Any]) -> ConfigurationError:
    """What the Trainer's constructor says against its settings, with near matches of a name.

    Args:
        error: its own.
        trainer: the Trainer's arguments.
    """
    names = {
        "strategy": ["auto", *StrategyRegistry.available_strategies()],
        "accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
    }
    for option, known in names.items():
        value = trainer.get(option)
        if isinstance(value, str) and value not in known:
            plain = ", ".join(name for name in known if "_" not in name)
            return ConfigurationError(
                f"trainer.{option}: no {option} is named {value}{near(value, known)}; there are {plain}, …"
            )
    return ConfigurationError(f"trainer: {reason(error)}")


def reason(error: BaseException) -> str:
    """What an error says, or its kind if it says nothing.

    Example:
        >>> reason(ValueError("no")), reason(AssertionError())
        ('no', 'AssertionError')
    """
    return str(error).strip() or type(error).__name__


def keys_of(kind: type, config: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Keys whose `class_path` names a class.

    Example:
        >>> list(keys_of(dict, {"trainer": {"callbacks": [{"class_path": "builtins.dict"}]}}))
        ['trainer.callbacks.0']
    """
    path = config.get("class_path")
    if isinstance(path, str) and path.rpartition(".")[2] == kind.__name__:
        yield above
    for name, below in config.items():
        key = f"{above}.{name}" if above else str(name)
        for number, node in enumerate(below) if isinstance(below, list) else ((None, below),):
            if isinstance(node, Mapping):
                yield from keys_of(kind, node, key if number is None else f"{key}.{number}")


def left_out(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What a setting of the trainer's means for others that come from the files: they are left out.

    `barebones` leaves out loggers, checkpoints, bars and all callbacks; `enable_checkpointing: false` the callbacks
    that write checkpoints; `enable_progress_bar: false` bars; `logger: false` callbacks that need a logger.

    Args:
        trainer: the Trainer's arguments.

    Returns:
        Those that are replaced.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> left_out({"enable_checkpointing": False, "callbacks": [ModelCheckpoint()]})
        {'callbacks': []}
    """
    callbacks = trainer.get("callbacks")
    callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [] if callbacks is None else [callbacks]
    if trainer.get("barebones"):
        rank_zero_info(
            "trainer.barebones: no logger, checkpoint, bar or callback of the configuration: the run shows how fast "
            "it can be, and leaves no LoRA"
        )
        return dict.fromkeys(BAREBONES) | {"callbacks": []}
    useless: tuple[type[Callback], ...] = ()
    if trainer.get("enable_checkpointing") is False:
        useless += (Checkpoint,)
    if trainer.get("enable_progress_bar") is False:
        useless += (ProgressBar,)
    if trainer.get("logger") is False:
        useless += NEEDS_LOGGER
    kept = [callback for callback in callbacks if not isinstance(callback, useless)]
    return {} if len(kept) == len(callbacks) else {"callbacks": kept}


def check_seed(seed: bool | int) -> None:
    """Holds `seed_everything` to one number that numpy takes.

    Raises:
        ConfigurationError: it is out of range, or `true`, which would draw another one in each process.

    Example:
        >>> check_seed(0)
    """
    if seed is True or not 0 <= seed <= MAX_SEED:
        raise ConfigurationError(
            f"seed_everything: expected a number from 0 to {MAX_SEED}, the same for all processes, got {seed}"
        )


def check_names(callbacks: Sequence[Callback]) -> None:
    """Raises ConfigurationError if checkpoints would keep two callbacks' state under one name."""
    seen: dict[str, int] = {}
    for number, callback in enumerate(callbacks):
        stateful = type(callback).state_dict is not Callback.state_dict
        if stateful and callback.state_key in seen:
            raise ConfigurationError(
                f"trainer.callbacks: {type(callback).__name__} comes twice, as number {seen[callback.state_key]} and "
                f"{number}, and a checkpoint would keep both under one name; leave one out, or give them other options"
            )
        seen[callback.state_key] = number
