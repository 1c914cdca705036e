"""LightningCLI with FDFOModule and PromptDataModule: the commands `fit`, `validate`, `test` and `predict`.

On the command line:

    lightning-fdfo fit --config configs/quickstart.yaml [--model.rewards.OCR 0.3 …]
    lightning-fdfo validate | test | predict --config … [--ckpt_path CHECKPOINT, LORA or HUB_NAME]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.callbacks.timer import Interval
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from lightning_fdfo.callbacks.epoch_progress import EpochProgress
from lightning_fdfo.callbacks.image_writer import ImageWriter
from lightning_fdfo.callbacks.metrics_writer import MetricsWriter
from lightning_fdfo.callbacks.slurm_requeue import SLURMRequeue, is_requeued
from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.checkpoints.last_checkpoint import LastCheckpoint
from lightning_fdfo.checkpoints.run_owner import RunOwner
from lightning_fdfo.commands import exit_code
from lightning_fdfo.commands.ckpt_path import check_ckpt_path, find_last_checkpoint, find_lora
from lightning_fdfo.commands.configuration.building import check_names, check_seed, left_out, refusal
from lightning_fdfo.commands.configuration.kept_arguments import changed_classes
from lightning_fdfo.commands.configuration.mixture_arguments import with_changes
from lightning_fdfo.commands.configuration.parser import FDFOArgumentParser, find_configuration_error
from lightning_fdfo.commands.configuration.relative_paths import resolve_paths
from lightning_fdfo.commands.console import quiet_libraries
from lightning_fdfo.commands.run_record import RECORD, RunRecord
from lightning_fdfo.data import PromptDataModule
from lightning_fdfo.guards.stop import StopOnSignal, ends_at_once, ends_together, resuming_command
from lightning_fdfo.module import FDFOModule
from lightning_fdfo.parallel import check_strategy
from lightning_fdfo.training.optimizer_settings import given_on_command_line

EVALUATION_COMMANDS = ("validate", "test", "predict")
"""Commands that train nothing."""


class FDFOCLI(LightningCLI):
    """LightningCLI with strict keys, interpolation, one seed for all, and atomic checkpoints.

    Args:
        args: command-line arguments; None takes them from the process.
        run: False builds trainer, model and data of arguments without a command, and runs nothing.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        yaml.SafeDumper.add_representer(Interval, lambda dumper, value: dumper.represent_str(value.value))  # a Timer's
        command = next(iter(sys.argv[1:] if args is None else args), "")
        if run and command in (known := self.subcommands()):  # parsers for all would be a quarter of its start
            self.subcommands = lambda: {command: known[command]}  # type: ignore[method-assign]
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
        """What Lightning can do with a module and data."""
        return LightningCLI.subcommands()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The module's seed is `seed_everything`; a flow without a class is the one that `pretrained` says."""
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.set_defaults({"model.flow": {"class_path": "lightning_fdfo.flows.DiffusersFlow"}})

    def before_instantiate_classes(self) -> None:
        """Finds what `--ckpt_path` names, and relative paths.

        A job that SLURM has queued again resumes its run, by the command that it was started with.

        Raises:
            ConfigurationError: there is no such thing.
        """
        config = self.config.get(str(self.subcommand), self.config)
        parsers = [self.parser, *self._subcommand_parsers.values()] if self.subcommand else [self.parser]
        resolve_paths(
            config, [file for parser in parsers for file in getattr(parser, "config_files", [])], self.subcommand
        )
        ckpt_path = config.get("ckpt_path")
        self.lora_file = None
        if self.subcommand in EVALUATION_COMMANDS:
            if ckpt_path and ckpt_path != "last":
                self.lora_file = find_lora(ckpt_path)
            config.ckpt_path = None if self.lora_file is not None else ckpt_path
            return
        check_ckpt_path(ckpt_path)
        folder = Path(config.trainer.default_root_dir or ".")
        if not ckpt_path and is_requeued() and (folder / RECORD).exists():
            rank_zero_info(f"SLURM has queued this job again: it resumes the run in {folder}")
            config.ckpt_path = "last"

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; one value of a mixture's term may be changed by itself, see configuration/mixture_arguments.py."""
        given = sys.argv[1:] if args is None else args
        self.resume_overrides = given_on_command_line(given)
        complete = with_changes(parser, given)
        if complete == given:
            super().parse_arguments(parser, args)
        else:
            self.config = parser.parse_args(complete)
        command = self.config.get("subcommand")
        check_seed((self.config[command] if command else self.config).seed_everything)
        self._report_kept_arguments(given)

    def _report_kept_arguments(self, words: Sequence[str]) -> None:
        """Logs which of a file's arguments count for a class that the file does not name."""
        config = self.config.get(str(self.config.get("subcommand")), self.config)
        for sentence in changed_classes(config.as_dict(), [str(word) for word in words]):
            rank_zero_info(sentence)

    def _parse_ckpt_path(self) -> None:
        """Lightning would take a checkpoint's `hyper_parameters` into the configuration, which may name code."""

    def instantiate_classes(self) -> None:
        """Builds all; a LoRA that `--ckpt_path` names takes the place of the configuration's, a file that of `last`."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if "`tensorboard`" in str(error):  # Lightning's logger names no module, but says this
                raise ModuleNotFoundError("tensorboard is not installed", name="tensorboard") from error
            raise find_configuration_error(error) or error from None
        options = self.config_init.get(str(self.subcommand), {})
        if options.get("ckpt_path") == "last":
            file = find_last_checkpoint(Path(self.trainer.default_root_dir), str(self.subcommand))
            options["ckpt_path"] = None if file is None else str(file)
        self.model.lora_file = self.lora_file
        self.model.resume_overrides = self.resume_overrides

    def before_fit(self) -> None:
        """Claims the run's folder before loggers, which write first, begin; with several processes they agree first."""
        owner, folder = RunOwner(), Path(self.trainer.default_root_dir)
        given, found = (self._get(config, "ckpt_path") for config in (self.config, self.config_init))
        owner.begins_anew = given == "last" and found is None
        self.trainer.callbacks.append(owner)  # type: ignore[attr-defined]
        if self.trainer.world_size == 1 and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            owner.claim(folder)
            owner.check_new(folder, found, self.trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs it; ctrl-C and SIGTERM end it without a traceback, and an error of one process ends all."""
        with ends_at_once(self.trainer), ends_together(self.trainer):
            super()._run_subcommand(subcommand)

    def test(self, **options: Any) -> None:
        """`Trainer.test`, with our table for Lightning's."""
        self.trainer.test(**options | {"verbose": False})

    def predict(self, **options: Any) -> None:
        """`Trainer.predict`, which keeps no images: they are on disk."""
        self.trainer.predict(**options | {"return_predictions": False})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds atomic checkpoints, unless the configuration has its own plugin for them, and `own_callbacks`."""
        trainer = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        kwargs |= left_out(trainer)
        trainer |= kwargs
        plugins = as_list(trainer.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(SafeCheckpointIO())
        self.trainer_defaults["callbacks"] = list(own_callbacks(self.subcommand, trainer))
        if self.subcommand in ("test", "predict"):  # they write folders of their own, and nothing into a run's logs
            kwargs["logger"] = False
        check_names(as_list(trainer.get("callbacks")))
        try:
            built = super().instantiate_trainer(plugins=plugins, **kwargs)
        except Exception as error:  # whatever Lightning, or a strategy that it loads, has against the settings
            raise refusal(error, trainer) from error
        check_strategy(built.strategy)  # before it starts processes
        return built


def own_callbacks(command: str | None, trainer: Mapping[str, Any]) -> Iterator[Callback]:
    """What a command adds to the callbacks of a configuration.

    Args:
        command: `fit`, …; None for the doctor.
        trainer: the Trainer's arguments.
    """
    yield SLURMRequeue()
    if command == "fit":
        yield StopOnSignal(resuming_command(sys.argv[0], sys.argv[1:]))
        if trainer.get("enable_checkpointing") is not False and not trainer.get("barebones"):
            yield LastCheckpoint()
    elif command == "test":
        yield MetricsWriter()
    elif command == "predict":
        yield ImageWriter()
    has_bar = any(isinstance(callback, ProgressBar) for callback in as_list(trainer.get("callbacks")))
    if trainer.get("enable_progress_bar") is not False and not trainer.get("barebones") and not has_bar:
        yield EpochProgress()


@exit_code.error_report.register
def _misconfiguration(error: MisconfigurationException) -> exit_code.ErrorReport:
    """What Lightning raises for settings that the user can fix."""
    return exit_code.ErrorReport(exit_code.one_line(error))


def main(run: Callable[[], Any] = FDFOCLI) -> Any:
    """Runs the process's arguments; errors that the user can fix end in one line and exit code 2, see exit_code.py.

    Args:
        run: the command; without it, what the process's arguments name.

    Returns:
        What `run` returns.
    """
    quiet_libraries()
    import lightning_fdfo.flows  # noqa: F401 - so that a configuration can name a flow by its class alone

    return exit_code.run(run)


def as_list(value: Any) -> list[Any]:
    """A setting of the Trainer's that may be None, one value or several, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
