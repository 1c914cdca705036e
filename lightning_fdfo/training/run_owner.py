"""RunOwner: one run a folder, and one process at a time that writes into it.

The folder is claimed before anything is written. Two files say so: `.lock`, which the operating system holds for the
process (and lets go when it is killed), and `run.json`, which stays: this folder holds a run.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import PARTIALS, write_text

LOCK = ".lock"
"""Held while a process trains into the folder."""
CURE = "choose another folder by --trainer.default_root_dir FOLDER"
MARK = "run.json"
"""In each folder that a run has been started in: which process, on which machine, since when."""


class RunOwner(Callback):
    """Claims the run's folder (`default_root_dir`) for a `fit`, and refuses one that is taken.

    A folder is taken while another process trains into it, on this machine or on one that shares its disk; and for
    good once it holds a run, unless the run is gone on with by `ckpt_path`. With `fast_dev_run` nothing is claimed, no
    checkpoint is written, and what callbacks write goes to a temporary folder (`trial_folder`).

    `FDFOModule.configure_callbacks` adds it to every trainer. A `fit` without checkpoints, and without a callback that
    writes, claims the folder only if something asks for it by `run_folder`.
    """

    def __init__(self) -> None:
        self._lock: FileLock | None = None
        self._begun: Path | None = None
        """The folder that this trainer has begun a run in: its next `fit` may go on there."""
        self.goes_on = False
        """Whether the command goes on with what the folder holds, even if no checkpoint has been written yet."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Claims the folder, if anything will be written; raises ConfigurationError on all processes if it is taken."""
        if stage != "fit":
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(
                f"fast_dev_run: {trainer.default_root_dir} is left as it is; this trial writes to {trial_folder()}"
            )
            # Lightning promises to write none, but writes `last` at the end.
            trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, Checkpoint)]  # type: ignore[attr-defined]
        elif any(map(_writes, trainer.callbacks)):  # type: ignore[attr-defined]
            self._on_first_process(trainer, lambda: self.claim(Path(trainer.default_root_dir)))

    def claim(self, folder: Path) -> bool:
        """Takes the folder for this process, until `release`; a second call does nothing.

        Args:
            folder: of the run.

        Returns:
            Whether it was this call that took it.

        Raises:
            ConfigurationError: it cannot be written, or another process trains into it.
        """
        if self._lock is not None:
            return False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigurationError(
                f"{folder}: {_holder(folder)} trains into it: wait for its end, or {CURE}"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"{folder} cannot be written: {error.strerror or error}; {CURE}") from error
        self._lock = lock
        for left in [*folder.glob(PARTIALS), *folder.glob(f"*/{PARTIALS}")]:  # of a process that was killed
            with suppress(OSError):
                left.unlink()
        return True

    def check_new(self, folder: Path, goes_on: bool) -> None:
        """Raises ConfigurationError, and lets the folder go, if it holds a run that is not gone on with."""
        if (folder / MARK).exists() and not goes_on and self._begun != folder:
            self.release()
            raise ConfigurationError(
                f"{folder} holds a run already: go on with it by --ckpt_path last (in Python by "
                f'ckpt_path="{folder}/checkpoints/last.ckpt"), or {CURE}'
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `begin`."""
        self._on_first_process(trainer, lambda: self.begin(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `begin`."""
        self._on_first_process(trainer, lambda: self.begin(trainer))

    def begin(self, trainer: Trainer) -> None:
        """Marks a claimed folder: here, where Lightning knows `ckpt_path`, and a run that cannot start leaves no mark.

        Raises:
            ConfigurationError: the folder holds a run that is not gone on with.
        """
        folder = Path(trainer.default_root_dir)
        if self._lock is None or self._begun == folder:
            return
        self.check_new(folder, self.goes_on or bool(trainer.ckpt_path))
        facts = {
            "software": f"lightning-fdfo {version('lightning-fdfo')}",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_text(folder / MARK, json.dumps(facts, indent=2) + "\n")
        self._begun = folder

    def _on_first_process(self, trainer: Trainer, action: Callable[[], object]) -> None:
        """What it raises is raised on all processes: the others would wait for it."""
        problem = ""
        if trainer.is_global_zero:
            try:
                action()
            except ConfigurationError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise ConfigurationError(problem)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets the folder go."""
        self.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets the folder go."""
        self.release()

    def release(self) -> None:
        """Lets the folder go, for another process to claim."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def trial_folder() -> Path:
    """Where a `fast_dev_run` of this process writes."""
    return Path(tempfile.gettempdir()) / f"lightning-fdfo-fast-dev-run-{os.getpid()}"


def _writes(callback: Callback) -> bool:
    """Whether a callback will write into the run's folder; one that is not known here asks by `run_folder`."""
    return isinstance(callback, Checkpoint) or type(callback).__module__.startswith("lightning_fdfo.callbacks.")


def _holder(folder: Path) -> str:
    """The process that holds a folder, as far as its mark says."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return f"process {facts['pid']} on {facts['host']} (since {facts['started']})"
    return "another process"
