"""LightningCLI with FDFOModule and PromptDataModule: the commands `fit` and `validate`.

lightning-fdfo fit --config configs/quickstart.yaml [--model.rewards.OCR 0.3 …]
lightning-fdfo validate --config … [--ckpt_path …]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import transformers
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from lightning_fdfo.callbacks import run_folder
from lightning_fdfo.checkpoint import AtomicCheckpointIO
from lightning_fdfo.data import PromptDataModule
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.module import FDFOModule

CKPT_KEYWORDS = ("last", "best", "hpc")
"""What Lightning takes for `--ckpt_path` beside a file."""


class FDFOArgumentParser(LightningArgumentParser):
    """Says an error in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong and exits with 2."""
        _fail(message)


class RunRecord(SaveConfigCallback):
    """Writes the resolved configuration into the run's folder, and refuses a folder that holds a run already."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ConfigurationError if `fit` would mix two runs in one folder, or go on with none."""
        record = Path(trainer.default_root_dir) / self.config_filename
        ckpt_path = self.config.get("ckpt_path")
        if ckpt_path and ckpt_path not in CKPT_KEYWORDS and not Path(ckpt_path).is_file():
            raise ConfigurationError(f"--ckpt_path: expected a file, or one of {CKPT_KEYWORDS}, got {ckpt_path}")
        if stage == "fit" and ckpt_path == "last" and not record.exists():
            raise ConfigurationError(f"--ckpt_path last: {record.parent} holds no run to go on with")
        if stage == "fit" and record.exists() and not ckpt_path:
            raise ConfigurationError(
                f"{record.parent} holds a run already: go on with it by --ckpt_path last, "
                f"or choose another folder by --trainer.default_root_dir FOLDER"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the record once all has been set up: a run that cannot start leaves no config.yaml."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes config.yaml; on a resume config-1.yaml and so on, beside it."""
        path, number = run_folder(trainer) / self.config_filename, 0
        while path.exists():
            number += 1
            path = path.with_name(f"{Path(self.config_filename).stem}-{number}.yaml")
        self.parser.save(self.config, path, skip_none=False)


class FDFOCLI(LightningCLI):
    """LightningCLI with strict keys, interpolation, one seed for all, and atomic checkpoints.

    Args:
        args: command-line arguments; None takes them from the process.
        run: False builds trainer, model and data of arguments without a command, and runs nothing.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        strict = {"allow_abbrev": False, "parser_mode": "omegaconf+"}
        super().__init__(
            FDFOModule,
            PromptDataModule,
            save_config_callback=RunRecord if run else None,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            parser_class=FDFOArgumentParser,
            parser_kwargs={**strict, **{name: dict(strict) for name in self.subcommands()}} if run else strict,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args) if args is not None else None,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `validate`."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The module's seed is `seed_everything`; a flow without a class is the one that `pretrained` says."""
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.set_defaults({"model.flow": {"class_path": "lightning_fdfo.flows.DiffusersFlow"}})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds atomic checkpoints, and Lightning's plain progress bar, unless the configuration has its own."""
        trainer = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        plugins = _as_list(trainer.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        has_bar = any(isinstance(callback, ProgressBar) for callback in _as_list(trainer.get("callbacks")))
        if trainer.get("enable_progress_bar") is not False and not has_bar:
            self.trainer_defaults["callbacks"] = [TQDMProgressBar()]
        return super().instantiate_trainer(plugins=plugins, **kwargs)


def main(run: Callable[[], Any] = FDFOCLI) -> Any:
    """Runs the process's arguments; errors that the user can mend end in one line and exit code 2.

    Args:
        run: what to run.

    Returns:
        What it gives.
    """
    transformers.logging.set_verbosity_error()
    import lightning_fdfo.flows  # noqa: F401 - so that a configuration can name an adapter by its class alone

    try:
        return run()
    except ConfigurationError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    """One line on standard error, from the first process only, and exit code 2."""
    if getattr(rank_zero_only, "rank", None) in (None, 0):
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _as_list(value: Any) -> list[Any]:
    """None, one, or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
