"""StopOnSignal: ctrl-C and SIGTERM end a run after the current batch, and say how it goes on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_fdfo.training.last_checkpoint import LastCheckpoint

NAMES = {signal.SIGINT: "ctrl-C", signal.SIGTERM: "SIGTERM"}
"""The signals that ask for an end."""


class StopOnSignal(Callback):
    """Ends `fit` after the current batch (of a rollout, of training or of a validation) on ctrl-C or SIGTERM.

    Nothing is written then: from the middle of an epoch no run goes on exactly. One sentence says what
    `LastCheckpoint` has saved and which command goes on; the process exits with 130 for ctrl-C and 143 for SIGTERM. A
    second ctrl-C ends it at once. On several processes all stop at the same batch, whichever of them was asked.

    It takes the place of Lightning's own handlers, which end with exit code 0 or 1 and do not look between the batches
    of a rollout. `FDFOModule` brings it to every `fit`.

    Args:
        command: that goes on with the run; None says it in Python.
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

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops between two epochs, before the next rollout."""
        self.stop_if_asked(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stops between two batches; after an epoch's last one, the epoch is ended and saved first."""
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
        raise SystemExit(0 if started and not trainer.is_global_zero else 128 + (self.asked or signal.SIGTERM))

    def outcome(self, trainer: Trainer) -> str:
        """One sentence: what is saved, and how the run goes on."""
        by = NAMES[self.asked or signal.SIGTERM]
        last = next((one for one in trainer.callbacks if isinstance(one, LastCheckpoint)), None)  # type: ignore[attr-defined]
        if last is None:
            return f"Stopped by {by}: nothing is saved, for checkpoints are switched off."
        if not last.num_epochs:
            again = f": begin anew by {self.command}" if self.command else ""
            return f"Stopped by {by}: no epoch has ended, so nothing is saved yet{again}"
        go_on = self.command or f"trainer.fit(module, data, ckpt_path={last.last_model_path!r})"
        return (
            f"Stopped by {by}: {last.last_model_path} holds {last.num_epochs} of {trainer.max_epochs} epochs; "
            f"go on by {go_on}"
        )

    def _ask(self, trainer: Trainer, number: signal.Signals) -> None:
        """Notes the first signal; the second ctrl-C ends all at once."""
        if self.asked is None:
            self.asked = number
            if trainer.is_global_zero:
                _say(f"{NAMES[number]}: the run ends after the current batch; ctrl-C ends it at once")
        elif number == signal.SIGINT:
            _end_others(trainer)
            if "ipykernel" in sys.modules:  # the process is a notebook's
                raise KeyboardInterrupt
            if trainer.is_global_zero:
                _say(self.outcome(trainer))
            os._exit(128 + number)


def stop_if_asked(trainer: Trainer) -> None:
    """Ends the process if a `StopOnSignal` of the trainer's was asked to: between the batches of a rollout."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopOnSignal):
            callback.stop_if_asked(trainer)


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
        raise SystemExit(128 + received)

    before = {number: signal.signal(number, end) for number in NAMES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resuming_command(program: str, words: Sequence[str]) -> str:
    """The command that goes on with a run, given the one that has started it.

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
    if launcher is not None:
        launcher.kill(signal.SIGKILL)


def _say(text: str) -> None:
    """A line on standard error, from a signal's handler: not by print, which it may have interrupted."""
    os.write(2, f"\n{text}\n".encode())
