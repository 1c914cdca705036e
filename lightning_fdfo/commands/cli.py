"""LightningCLI with FDFOModule and PromptDataModule: the commands `fit`, `validate`, `test` and `predict`.

On the command line:

    lightning-fdfo fit --config configs/quickstart.yaml [--model.rewards.OCR 0.3 …]
    lightning-fdfo validate | test | predict --config … [--ckpt_path CHECKPOINT, LORA or HUB_NAME]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.callbacks.timer import Interval
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lightning_fdfo.callbacks.epoch_progress import EpochProgress
from lightning_fdfo.callbacks.image_writer import ImageWriter
from lightning_fdfo.callbacks.metrics_writer import MetricsWriter
from lightning_fdfo.checkpoints.checkpoint_io import AtomicCheckpointIO, check_whole
from lightning_fdfo.checkpoints.last_checkpoint import LastCheckpoint, find_last
from lightning_fdfo.checkpoints.resumed_settings import check_optimizer
from lightning_fdfo.checkpoints.run_folder import is_inside, run_folder
from lightning_fdfo.checkpoints.run_owner import MARK, RunOwner
from lightning_fdfo.commands import exit_code
from lightning_fdfo.commands.ckpt_path import find_lora
from lightning_fdfo.commands.configuration.building import Builder, check_names, check_seed, left_out, refusal
from lightning_fdfo.commands.configuration.kept_arguments import changed_classes
from lightning_fdfo.commands.configuration.mixture_arguments import with_changes
from lightning_fdfo.commands.configuration.parse_errors import explain
from lightning_fdfo.commands.configuration.relative_paths import resolve_paths
from lightning_fdfo.commands.console import quiet_libraries
from lightning_fdfo.data import PromptDataModule
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.guards.slurm_requeue import SLURMRequeue, is_requeued
from lightning_fdfo.guards.stop import StopOnSignal, ends_at_once, ends_together, resuming_command
from lightning_fdfo.module import FDFOModule
from lightning_fdfo.parallel import check_strategy
from lightning_fdfo.training.optimizer_settings import given_on_command_line

MAX_NODES = 100_000
"""Values in a configuration file, each alias counted as what it stands for."""
JUDGING = ("validate", "test", "predict")
"""Commands that train nothing."""
RECORD = "config.yaml"
"""The resolved configuration, in the run's folder."""


class FDFOArgumentParser(LightningArgumentParser):
    """Says an error in one line, bounds what a configuration file unfolds to, and knows which files it has read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config_files: list[Path] = []

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parses a configuration file that is text, and of a size that can be."""
        self.config_files.append(Path(cfg_path))
        try:
            _check_yaml(Path(cfg_path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            self.error(f"{cfg_path}: {'nested too deeply' if isinstance(error, RecursionError) else error}")
        except (OSError, yaml.YAMLError):
            pass  # the parser's own words are good
        return super().parse_path(cfg_path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong and exits with 2; a settings object's own words take the place of the parser's."""
        message = exit_code.one_line(_own_words(ex) or explain(self, message))
        given = any(word.partition("=")[0] in ("--config", "-c") for word in sys.argv)
        text = message if given else f"{message} (no configuration was given: --config FILE)"
        exit_code.end(exit_code.ErrorReport(text))

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Builds what a configuration names; what a class refuses is one line."""
        builder = Builder(cfg.as_dict())
        with builder.told():
            return self.instantiate(cfg, instantiators=[(builder, object, True)], **kwargs)


class RunRecord(SaveConfigCallback):
    """Writes the resolved configuration into the run's folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ConfigurationError for a checkpoint that cannot be gone on from, or is not there."""
        record = Path(trainer.default_root_dir) / self.config_filename
        ckpt_path = self.config.get("ckpt_path")
        if self.config.get("weights_only") is False:
            raise ConfigurationError("--weights_only: expected true: a checkpoint's own code is never run")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                _check_checkpoints(callback)
        file = find_last(record.parent) if ckpt_path == "last" else ckpt_path
        if file:
            checkpoint = _read(trainer, Path(file))
            if stage == "fit" and checkpoint is not None:
                check_whole(checkpoint, file)
                check_optimizer(pl_module, checkpoint)

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


def _check_checkpoints(callback: ModelCheckpoint) -> None:
    """Raises ConfigurationError for names that leave the folder, and where `last` could be lost."""
    if callback.filename is not None and not is_inside(callback.filename):
        raise ConfigurationError(
            f"ModelCheckpoint: expected a filename below dirpath, got {callback.filename}; set dirpath instead"
        )
    if callback.save_last == "link":
        raise ConfigurationError(
            "ModelCheckpoint: expected save_last: true, got link: a run that is killed can leave it leading nowhere"
        )


def _read(trainer: Trainer, file: Path) -> dict[str, Any] | None:
    """A checkpoint without its tensors' values; None if another plugin than ours reads checkpoints.

    Raises:
        ConfigurationError: it cannot be read: before a model is loaded, and for every strategy.
    """
    reader = trainer.strategy.checkpoint_io
    return reader.load_checkpoint(file, map_location="meta") if isinstance(reader, AtomicCheckpointIO) else None


def _last(folder: Path, command: str) -> Path | None:
    """What `--ckpt_path last` means for a run's folder; None for `fit` to begin anew, which is said.

    Raises:
        ConfigurationError: there is no run, or its last.ckpt is gone, or there is nothing to judge.
    """
    file = find_last(folder)
    if file is None and command != "fit":
        raise ConfigurationError(
            f"--ckpt_path last: {folder} holds no checkpoint; name the run's folder by --trainer.default_root_dir, "
            "or a file"
        )
    if file is None and not any((folder / name).exists() for name in (MARK, RECORD)):
        raise ConfigurationError(
            f"--ckpt_path last: {folder} holds no run to go on with; leave --ckpt_path out to begin one"
        )
    if file is None:
        rank_zero_info(f"The run in {folder} was ended before its first checkpoint: it begins anew, from epoch 0")
    return file


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

        A job that SLURM has queued anew goes on with its run, by the command that it was started with.

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
        if self.subcommand in JUDGING:
            if ckpt_path and ckpt_path != "last":
                self.lora_file = find_lora(ckpt_path)
            config.ckpt_path = None if self.lora_file is not None else ckpt_path
            return
        if ckpt_path and ckpt_path != "last" and not Path(ckpt_path).is_file():
            raise ConfigurationError(f"--ckpt_path: expected a file, or last, got {ckpt_path}")
        if str(ckpt_path).endswith(".safetensors"):
            raise ConfigurationError(
                f"--ckpt_path: expected a checkpoint, got {ckpt_path}; start from a LoRA by --model.lora.init_lora"
            )
        if ckpt_path or not is_requeued():
            return
        folder = Path(config.trainer.default_root_dir or ".")
        if (folder / RECORD).exists():
            rank_zero_info(f"SLURM has queued this job anew: it goes on with the run in {folder}")
            config.ckpt_path = "last"

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; one value of a mixture's term may be changed by itself, see configuration/mixture_arguments.py."""
        given = sys.argv[1:] if args is None else args
        self.resume_overrides = given_on_command_line(given)
        whole = with_changes(parser, given)
        if whole == given:
            super().parse_arguments(parser, args)
        else:
            self.config = parser.parse_args(whole)
        command = self.config.get("subcommand")
        check_seed((self.config[command] if command else self.config).seed_everything)
        self._say_what_is_kept(given)

    def _say_what_is_kept(self, words: Sequence[str]) -> None:
        """Of a configuration file's arguments for another class than the one that is built."""
        config = self.config.get(str(self.config.get("subcommand")), self.config)
        for sentence in changed_classes(config.as_dict(), [str(word) for word in words]):
            rank_zero_info(sentence)

    def _parse_ckpt_path(self) -> None:
        """Lightning would take a checkpoint's `hyper_parameters` into the configuration, which may name code."""

    def instantiate_classes(self) -> None:
        """Builds all; a LoRA that is to be judged takes the place of the configuration's, a file that of `last`."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if "`tensorboard`" in str(error):  # Lightning's logger names no module, but says this
                raise ModuleNotFoundError("tensorboard is not installed", name="tensorboard") from error
            raise _own_words(error) or error from None
        options = self.config_init.get(str(self.subcommand), {})
        if options.get("ckpt_path") == "last":
            file = _last(Path(self.trainer.default_root_dir), str(self.subcommand))
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
        """Adds atomic checkpoints, and a progress bar over epochs, unless the configuration has its own."""
        trainer = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        kwargs |= left_out(trainer)
        trainer |= kwargs
        plugins = as_list(trainer.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        has_bar = any(isinstance(callback, ProgressBar) for callback in as_list(trainer.get("callbacks")))
        writers: dict[str, list[Callback]] = {"test": [MetricsWriter()], "predict": [ImageWriter()]}
        writers["fit"] = [StopOnSignal(resuming_command(sys.argv[0], sys.argv[1:]))]
        if trainer.get("enable_checkpointing") is not False and not trainer.get("barebones"):
            writers["fit"].append(LastCheckpoint())
        self.trainer_defaults["callbacks"] = [SLURMRequeue(), *writers.get(str(self.subcommand), [])]
        if trainer.get("enable_progress_bar") is not False and not trainer.get("barebones") and not has_bar:
            self.trainer_defaults["callbacks"].append(EpochProgress())
        if self.subcommand in ("test", "predict"):  # they write folders of their own, and nothing into a run's logs
            kwargs["logger"] = False
        check_names(as_list(trainer.get("callbacks")))
        try:
            built = super().instantiate_trainer(plugins=plugins, **kwargs)
        except Exception as error:  # whatever Lightning, or a strategy that it loads, has against the settings
            raise refusal(error, trainer) from error
        check_strategy(built.strategy)  # before it starts processes
        return built


@exit_code.error_report.register
def _misconfiguration(error: MisconfigurationException) -> exit_code.ErrorReport:
    """Lightning's own word for what the user can mend."""
    return exit_code.ErrorReport(exit_code.one_line(error))


def _own_words(error: BaseException | None) -> ConfigurationError | None:
    """What a settings object has said, under what the parser has made of it."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error


def main(run: Callable[[], Any] = FDFOCLI) -> Any:
    """Runs the process's arguments; errors that the user can mend end in one line and exit code 2, see exit_code.py.

    Args:
        run: what to run.

    Returns:
        What it gives.
    """
    quiet_libraries()
    import lightning_fdfo.flows  # noqa: F401 - so that a configuration can name an adapter by its class alone

    return exit_code.run(run)


def _check_yaml(text: str) -> None:
    """Raises ValueError for aliases that unfold to more than `MAX_NODES` values, or hold themselves."""
    sizes: dict[int, float] = {}

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # what it is to one that holds itself
            parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(map(size, parts)))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and size(root) > MAX_NODES:
        raise ValueError(f"expected at most {MAX_NODES} values, aliases unfolded")


def as_list(value: Any) -> list[Any]:
    """None, one, or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
