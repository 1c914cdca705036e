"""RunOwner: one run per folder, and one process at a time that writes into it.

The folder is claimed before anything is written. Two files say so: `.lock`, which names the process, and which the
operating system holds for it (and lets go when it is killed); and `run.json`, which stays: this folder holds a run.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import PARTIALS, write_text

LOCK = ".lock"
"""Held while a process trains into the folder."""
HINT = "choose another folder by --trainer.default_root_dir FOLDER"
MARK = "run.json"
"""In each folder that a run has been started in: which process, on which machine, since when."""
HELD = (MARK, "checkpoints/*.ckpt", "lora/*.safetensors")
"""Patterns of files that a run leaves, which another one would write over."""
WRITTEN = ("", "checkpoints", "lora", "lora_raw", "pairs", "samples")
"""Folders below a run's that it writes into."""


class RunOwner(Callback):
    """Claims the run's folder (`default_root_dir`) for a `fit`, and refuses one that is taken.

    A folder is taken while another process trains into it, on this machine or on one that shares its disk; and for
    good once it holds a run, unless the run is resumed by a `ckpt_path` inside it. With `fast_dev_run` nothing is
    claimed, no checkpoint is written, and what callbacks write goes to a temporary folder (`trial_folder`).

    `FDFOModule.configure_callbacks` adds it to every trainer. A `fit` without checkpoints, and without a callback that
    writes, claims the folder only if something asks for it by `run_folder`.
    """

    def __init__(self) -> None:
        self._lock: FileLock | None = None
        self._begun: Path | None = None
        """The folder that this trainer has begun a run in: its next `fit` may resume there."""
        self.begins_anew = False
        """Whether the command was asked to resume, and no checkpoint has been written yet."""

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
                f"{folder}: {_holder(folder)} trains into it: wait for its end, or {HINT}"
            ) from error
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"{folder} cannot be written: {reason}; {HINT}") from error
        self._lock = lock
        with suppress(OSError):  # a system that locks a file's content has no room for it
            (folder / LOCK).write_text(_this_process(), encoding="utf-8")
        for left in (path for below in WRITTEN for path in (folder / below).glob(PARTIALS)):
            if not _is_being_written(left):
                left.unlink(missing_ok=True)
        return True

    def check_new(self, folder: Path, ckpt_path: str | Path | None, trainer: Trainer | None = None) -> None:
        """Refuses a folder that holds a run which is not resumed, and lets it go.

        Args:
            folder: claimed.
            ckpt_path: what the run resumes from, if anything; a checkpoint of this folder's own run lies inside it, or
                where a checkpoint callback of the trainer writes.
            trainer: of the run.

        Raises:
            ConfigurationError: it holds another run.
        """
        callbacks = [] if trainer is None else trainer.checkpoint_callbacks
        own = [folder, *(path for one in callbacks if (path := getattr(one, "dirpath", None)))]
        goes_on = ckpt_path is not None and any(
            Path(ckpt_path).resolve().is_relative_to(Path(place).resolve()) for place in own
        )
        held = any(path for pattern in HELD for path in folder.glob(pattern))
        if held and not goes_on and not self.begins_anew and self._begun != folder:
            self.release()
            raise ConfigurationError(
                f"{folder} holds a run already: resume it by --ckpt_path last (in Python by "
                f'ckpt_path="{folder}/checkpoints/last.ckpt"), or {HINT}'
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
            ConfigurationError: the folder holds a run that is not resumed.
        """
        folder = Path(trainer.default_root_dir)
        if self._lock is None or self._begun == folder:
            return
        self.check_new(folder, trainer.ckpt_path, trainer)
        if not (folder / MARK).exists():  # else it names the process that began the run
            write_text(folder / MARK, _this_process())
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


@functools.cache
def trial_folder() -> Path:
    """Where a `fast_dev_run` of this process writes: a new temporary folder."""
    return Path(tempfile.mkdtemp(prefix="lightning-fdfo-fast-dev-run-"))


def _writes(callback: Callback) -> bool:
    """Whether a callback will write into the run's folder; one that is not known here asks by `run_folder`."""
    return isinstance(callback, Checkpoint) or type(callback).__module__.startswith("lightning_fdfo.callbacks.")


def _this_process() -> str:
    facts = {
        "software": f"lightning-fdfo {version('lightning-fdfo')}",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(facts, indent=2) + "\n"


def _is_being_written(partial: Path) -> bool:
    """Whether the process whose number the file's name ends in is alive, as that of an export may be."""
    number = partial.name.rpartition("-")[2]
    return number.isdecimal() and int(number) != os.getpid() and psutil.pid_exists(int(number))


def _holder(folder: Path) -> str:
    """The process that holds a folder, as far as its lock says."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return f"process {facts['pid']} on {facts['host']} (since {facts['started']})"
    return "another process"
