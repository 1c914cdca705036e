"""How a run ends early: by ctrl-C or SIGTERM, after the current batch or update; or by an error of one process."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightning_fdfo.checkpoints.last_checkpoint import LastCheckpoint
from lightning_fdfo.errors import StoppedError

NAMES = {signal.SIGINT: "ctrl-C", signal.SIGTERM: "SIGTERM"}
"""The signals that ask for an end."""
PATIENCE = 10.0
"""Seconds in which a process that has failed ends, after the others have lost it."""


class StopOnSignal(Callback):
    """Ends `fit` after the current batch of a rollout or of a validation, or the current update, on ctrl-C or SIGTERM.

    Nothing is written then: from the middle of an epoch no run resumes exactly. One sentence says what
    `LastCheckpoint` has saved and which command resumes; the process exits with 130 for ctrl-C and 143 for SIGTERM. A
    second ctrl-C ends it at once. On several processes all stop at the same place, whichever of them was asked.

    It takes the place of Lightning's own handlers, which end with exit code 0 or 1 and do not look between the batches
    of a rollout. `FDFOModule` brings it to every `fit`.

    Args:
        command: that resumes the run; None says it in Python.
    """

    def __init__(self, command: str | None = None) -> None:
        self.command = command
        self.asked: signal.Signals | None = None
        """The signal that has come."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the signals of an earlier `fit`."""
        self.asked = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals: now, for Lightning has just taken them; it puts back what was before it in the end."""
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                signal.signal(number, lambda received, _: self._ask(trainer, signal.Signals(received)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where there is no sanity check."""
        self.on_sanity_check_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stops between two updates; after an epoch's last one, the epoch is ended and saved first.

        Not between the batches that an update accumulates: to ask is to wait for all processes.
        """
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.stop_if_asked(trainer)

    def on_rollout_batch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops between two batches of a rollout."""
        self.stop_if_asked(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stops between two batches of a validation."""
        self.stop_if_asked(trainer)

    def stop_if_asked(self, trainer: Trainer) -> None:
        """Ends the process if any of the run's processes was asked to; all must call it."""
        if not trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False):
            return
        if trainer.is_global_zero:
            print(f"\n{self.outcome(trainer)}", file=sys.stderr, flush=True)
        # The observer that Lightning has of the processes it started would kill this one for another's exit code.
        started = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
        raise StoppedError(0 if started and not trainer.is_global_zero else 128 + (self.asked or signal.SIGTERM))

    def outcome(self, trainer: Trainer) -> str:
        """One sentence: what is saved, and how the run resumes."""
        by = NAMES[self.asked or signal.SIGTERM]
        last = next((one for one in trainer.callbacks if isinstance(one, LastCheckpoint)), None)  # type: ignore[attr-defined]
        if last is None:
            return f"Stopped by {by}: nothing is saved, for checkpoints are switched off."
        if not last.num_epochs:
            again = f": start again by {self.command}" if self.command else ""
            return f"Stopped by {by}: no epoch has ended, so nothing is saved yet{again}"
        go_on = self.command or f"trainer.fit(module, data, ckpt_path={last.last_model_path!r})"
        return (
            f"Stopped by {by}: {last.last_model_path} holds {last.num_epochs} of {trainer.max_epochs} epochs; "
            f"resume by {go_on}"
        )

    def _ask(self, trainer: Trainer, number: signal.Signals) -> None:
        """Notes the first signal; the second ctrl-C ends all at once."""
        if self.asked is None:
            self.asked = number
            if trainer.is_global_zero:
                again = "a second" if number == signal.SIGINT else "a"
                _say(f"{NAMES[number]}: the run ends after the current batch or update; {again} ctrl-C ends it at once")
        elif number == signal.SIGINT:
            _end_others(trainer)
            if "ipykernel" in sys.modules:  # the process is a notebook's
                raise KeyboardInterrupt
            if trainer.is_global_zero:
                _say(self.outcome(trainer))
            os._exit(128 + number)


@contextmanager
def ends_at_once(trainer: Trainer) -> Iterator[None]:
    """Outside of training, ctrl-C and SIGTERM end a command at once: with one line, and 130 or 143 as exit code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(received: int, _: Any) -> NoReturn:
        _end_others(trainer)
        if trainer.is_global_zero:
            _say(f"{NAMES[signal.Signals(received)]}: ended outside of training; the same command does it again")
        raise StoppedError(128 + received)

    before = {number: signal.signal(number, end) for number in NAMES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ends_together(trainer: Trainer) -> Iterator[None]:
    """An error of one process ends the others, which may wait for it in a collective; the first error alone is said.

    It concerns the processes that Lightning has started; others belong to what has started them, torchrun or SLURM.
    """
    try:
        yield
    except Exception as error:
        code = _code_of_others(trainer) if _has_lost_another(error) else None
        _end_others(trainer)
        if code is None:
            raise
        raise StoppedError(code) from error


def resuming_command(program: str, words: Sequence[str]) -> str:
    """The command that resumes a run, given the one that has started it.

    Args:
        program: the first word, as the process sees it.
        words: the others.

    Example:
        >>> resuming_command("/venv/bin/lightning-fdfo", ["fit", "--config", "a b.yaml", "--ckpt_path=last"])
        "lightning-fdfo fit --config 'a b.yaml' --ckpt_path last"
    """
    name = Path(program).name
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word != "--ckpt_path" and not word.startswith("--ckpt_path="):
            kept.append(word)
        skip = word == "--ckpt_path"
    start = ["python", "-m", "lightning_fdfo"] if name == "__main__.py" else [name]
    return shlex.join([*start, *kept, "--ckpt_path", "last"])


def _end_others(trainer: Trainer) -> None:
    """Ends the processes that the trainer has started: they may wait for this one in a collective."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        started = launcher.procs[:]
        launcher.procs.clear()  # Lightning's observer of this list would end this process too, by SIGKILL
        for process in started:
            process.kill()


def _has_lost_another(error: Exception) -> bool:
    """Whether a collective has failed: gloo raises a plain RuntimeError."""
    return isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl"))


def _code_of_others(trainer: Trainer) -> int | None:
    """The exit code of the process whose error has come first; None if none has ended by an error of its own."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and not trainer.is_global_zero:
            time.sleep(2 * PATIENCE)  # the process that has started this one looks at all, and ends this one
        return None
    started = launcher.procs[:]
    end = time.monotonic() + PATIENCE
    while started and time.monotonic() < end:
        codes = [process.poll() for process in started]
        if any(codes):
            return next((code for code in codes if code and code > 0), None)
        time.sleep(0.05)
    return None


def _say(text: str) -> None:
    """A line on standard error, from a signal's handler: not by print, which it may have interrupted."""
    os.write(2, f"\n{text}\n".encode())
