"""`lightning-fdfo doctor --config FILE`: builds all that a run needs, tries each part, and prints what it found.

First what can be checked without loading the model: its folder, the rewards' weights, the prompts, the arithmetic of an
epoch. Then, if nothing has failed, the trainer of the configuration sets the model up, on its device and in its
precision, for the probes of doctor_probes.py. Nothing is written but encoded texts, if the configuration caches them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.markup import escape

from lightning_fdfo.commands.cli import FDFOCLI, as_list
from lightning_fdfo.commands.doctor_probes import Finding, examine
from lightning_fdfo.data import PromptDataModule
from lightning_fdfo.errors import ConfigurationError, DivergenceError, RewardError
from lightning_fdfo.guards.capacity import check_fits
from lightning_fdfo.guards.untrainable_settings import cannot_learn
from lightning_fdfo.module import FDFOModule
from lightning_fdfo.prompts import Prompt, read_prompts
from lightning_fdfo.reward.prompt_check import check_prompts

MAX_FAULTS = 5
"""Faulty prompts that are listed one by one."""


class DoctorCLI(FDFOCLI):
    """Builds what `fit` would build, with a trainer that examines instead of training."""

    def __init__(self, args: Sequence[str], examination: Callback) -> None:
        self.examination = examination
        self.faults: list[Finding] = []
        """Of the trainer that the configuration asks for."""
        super().__init__(args, run=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """A run's own record names what `fit` has beside the classes; it makes no difference here."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="not used")
        parser.add_argument("--weights_only", type=bool | None, default=None, help="not used")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The configuration's device, strategy and precision; nothing that writes, and no epoch."""
        self.callbacks = as_list(self._get(self.config_init, "trainer", default={}).get("callbacks"))
        silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        silent |= {"enable_model_summary": False, "barebones": False}
        options: dict[str, Any] = {**kwargs, **silent, "callbacks": [self.examination]}
        options |= {"max_epochs": 0, "max_steps": -1, "num_sanity_val_steps": 0}
        try:
            return self._examining_only(super().instantiate_trainer(**options))
        except ConfigurationError as error:  # such as for a GPU that is not there
            problem = " ".join(str(error).removeprefix("trainer: ").split())
            asked = self._get(self.config_init, "trainer", default={})
            settings = ", ".join(f"{name} {asked.get(name)}" for name in ("accelerator", "devices", "strategy"))
            self.faults.append(
                Finding(
                    False,
                    f"trainer ({settings}): {problem}; run it where torch finds such devices, or "
                    "set --trainer.accelerator cpu; all else is looked at on the CPU",
                )
            )
        on_cpu = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
        return self._examining_only(super().instantiate_trainer(**options | on_cpu))

    def _examining_only(self, trainer: Trainer) -> Trainer:
        """Takes off what the command line adds for a run: it would claim the run's folder, or queue a job again."""
        trainer.callbacks = [one for one in trainer.callbacks if one is self.examination or not _is_ours(one)]  # type: ignore[attr-defined]
        return trainer


def _is_ours(callback: Callback) -> bool:
    return type(callback).__module__.startswith("lightning_fdfo.")


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: those of `fit`.

    Returns:
        0 if all is in order, 1 with a fault.
    """
    examination = Examination()
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    warnings.filterwarnings("ignore", message=".*`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's own
    cli = DoctorCLI(arguments, examination)
    findings = cli.faults + list(before_loading(cli.model, cli.datamodule, cli.trainer, cli.callbacks))
    if all(finding.ok for finding in findings):
        try:
            cli.trainer.fit(cli.model, cli.datamodule)
            findings += examination.findings
        except Exception as error:  # whatever it is, what was found before it is printed too
            known = isinstance(error, ConfigurationError | DivergenceError | RewardError)
            problem = str(error) if known else f"{type(error).__name__}: {error}"
            findings += [*examination.findings, Finding(False, problem)]
    if not cli.trainer.is_global_zero:
        return 0
    print_findings(findings)
    return int(not all(finding.ok for finding in findings))


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints a line for each finding, and the number of faults."""
    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        mark = "[green]ok[/green]   " if finding.ok else "[bold red]FAIL[/bold red] "
        text = escape(finding.text)
        console.print(mark + (text if finding.ok else f"[red]{text}[/red]"))
    faults = sum(not finding.ok for finding in findings)
    console.print(f"{faults} fault{'s' * (faults != 1)}" if faults else "Ready to train.")


# Without the model


def before_loading(
    module: FDFOModule, data: PromptDataModule, trainer: Trainer, callbacks: Sequence[Callback] = ()
) -> Iterator[Finding]:
    """What can be known before the model is loaded."""
    module.trainer = trainer
    for callback in callbacks:
        if _is_ours(callback):
            check = partial(callback.setup, trainer, module, "fit")
            yield _tried(check, f"{type(callback).__name__} fits the configuration")
    yield _tried(
        module.flow.validate, f"{getattr(module.flow, 'pretrained', 'the model')} is a model that the flow serves"
    )
    yield from _fits(module)
    yield _tried(module.fetch_weights, f"the weights of {', '.join(module.rewards.terms)} are available")
    if module.evaluator.embedder is not None:
        yield _tried(
            module.evaluator.embedder.fetch,
            f"the weights of {module.evaluation.diversity}, for diversity, are in the cache",
        )
    yield from _prompts(module, data)
    yield from (Finding(False, sentence) for sentence in cannot_learn(module, trainer.max_epochs))
    try:
        yield Finding(True, str(module.plan))
    except ConfigurationError as error:
        yield Finding(False, str(error))
    if module.batching.updates_per_epoch == 1:
        yield Finding(True, "objective.clip_range has no effect with updates_per_epoch 1: a first update's ratio is 1")


def _fits(module: FDFOModule) -> Iterator[Finding]:
    """What `fit` refuses, or warns of, for a model's positions, a LoRA's rank and the memory here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield _tried(partial(check_fits, module, "fit"), "sizes and counts fit the model, and the memory here")
    yield from (Finding(False, str(warning.message)) for warning in caught if warning.category is UserWarning)


def _tried(function: Callable[[], Any], text: str) -> Finding:
    try:
        function()
    except ConfigurationError as error:
        return Finding(False, str(error))
    return Finding(True, text)


def _prompts(module: FDFOModule, data: PromptDataModule) -> Iterator[Finding]:
    """Whether each row has what the rewards need, and the metrics for validation."""
    files = {data.train_path: True, data.val_path: False, data.test_path: False}
    for path, train in files.items():
        if path is None:
            continue
        try:
            prompts = read_prompts(path)
        except ConfigurationError as error:
            yield Finding(False, str(error))
            continue
        faults = [fault for prompt in prompts if (fault := _fault(module, prompt, train))]
        yield from (Finding(False, fault) for fault in faults[:MAX_FAULTS])
        if len(faults) > MAX_FAULTS:
            yield Finding(False, f"{path}: {len(faults) - MAX_FAULTS} more such prompts")
        if not faults:
            yield Finding(True, f"{path}: {len(prompts)} prompts, each with what its rewards need")


def _fault(module: FDFOModule, prompt: Prompt, train: bool) -> str | None:
    try:
        check_prompts(module.rewards, module.evaluator.metrics, [prompt] if train else [], [] if train else [prompt])
    except ConfigurationError as error:
        return str(error)
    return None


# With the model


class Examination(Callback):
    """Tries the model when all is in place, before the first epoch would begin."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Examines; without `max_epochs` nothing follows."""
        self.findings += examine(cast(FDFOModule, pl_module), trainer.datamodule.train_prompts[0])  # type: ignore[attr-defined]
