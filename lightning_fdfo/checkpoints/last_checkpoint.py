"""LastCheckpoint: `checkpoints/last.ckpt`, written at every epoch's end, and how a run finds it again."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_fdfo.errors import ConfigurationError

FOLDER = "checkpoints"
"""Below the run's folder."""
LAST = "last.ckpt"
MAX_NAMED = 5
"""Checkpoints that a message lists."""


class LastCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt` into the run's folder at the end of every training epoch, atomically.

    `FDFOModule` brings it to every `fit` whose trainer has checkpoints enabled, the command and plain Python alike.
    It is written after all other work of an epoch's end: what the epoch has logged and the checkpoints that are kept
    are on disk before it. An epoch that is cut short is not written: from its middle no run resumes exactly, for its
    rollout is gone.

    Lightning's `ModelCheckpoint(save_top_k=0, save_last=True)` cannot take its place: it writes when `fit` ends. A
    `save_last` that would write the same file is switched off; one that falls behind is named at the start. That no
    other run's file is written over is RunOwner's matter.
    """

    def __init__(self) -> None:
        self.last_model_path = self.best_model_path = ""
        """The file, once it is written, under the names that Lightning asks checkpoint callbacks for."""
        self.dirpath = ""
        """Its folder, once `fit` is set up."""
        self._gone_on_from: object = None
        self.num_epochs = 0
        """Epochs that the file holds."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles who writes last.ckpt."""
        if stage != "fit":
            return
        self.dirpath = str(last_file(trainer.default_root_dir).parent)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                _settle(callback, trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what is there, once Lightning says what the run resumes from."""
        file = last_file(trainer.default_root_dir)
        if self.last_model_path or trainer.fast_dev_run:  # type: ignore[attr-defined]  # this trainer's own
            return
        if trainer.ckpt_path is None:
            return
        # current_epoch, which counts completed epochs, is one behind until training starts
        done: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        if self._gone_on_from != trainer.ckpt_path:  # said once
            self._gone_on_from = trainer.ckpt_path
            planned = trainer.max_epochs
            rest = "" if done != planned else ", which are all: a higher trainer.max_epochs trains longer"
            rank_zero_info(f"Resuming from {trainer.ckpt_path}: {done} of {planned} epochs are done{rest}")
        if Path(trainer.ckpt_path).resolve() == file.resolve():
            self.last_model_path = self.best_model_path = str(file)
            self.num_epochs = done

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where there is no sanity check."""
        self.on_sanity_check_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file: on every process, for weights may be sharded."""
        if trainer.fast_dev_run or not trainer.is_last_batch:  # type: ignore[attr-defined]
            return
        file = last_file(trainer.default_root_dir)
        trainer.save_checkpoint(file)
        self.last_model_path = self.best_model_path = str(file)
        self.num_epochs = trainer.current_epoch + 1


def last_file(folder: str | Path) -> Path:
    """Where a run has its last checkpoint.

    Example:
        >>> last_file("runs/mine").as_posix()
        'runs/mine/checkpoints/last.ckpt'
    """
    return Path(folder) / FOLDER / LAST


def find_last(folder: str | Path) -> Path | None:
    """The checkpoint that a run in a folder resumes from: what `--ckpt_path last` means.

    Args:
        folder: the run's, the trainer's `default_root_dir`.

    Returns:
        The file; None if no checkpoint has been written yet, so that the run starts from scratch.

    Raises:
        ConfigurationError: last.ckpt is gone, but other checkpoints are there; the message names them.

    Example:
        >>> find_last("runs/none") is None
        True
    """
    file = last_file(folder)
    if file.is_file():
        return file
    others = sorted((path for path in file.parent.glob("**/*.ckpt") if path.is_file()), key=lambda p: p.stat().st_mtime)
    if not others:
        return None
    named = ", ".join(str(path.relative_to(file.parent)) for path in others[: -MAX_NAMED - 1 : -1])
    more = f" and {len(others) - MAX_NAMED} older ones" if len(others) > MAX_NAMED else ""
    raise ConfigurationError(
        f"--ckpt_path last: {file.parent} holds no {LAST}, but {named}{more}: resume from one by --ckpt_path "
        f"{others[-1]}, or start from scratch in another folder by --trainer.default_root_dir FOLDER"
    )


def _settle(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Switches off a save_last that would write the same file; names settings that promise what they cannot keep."""
    file = last_file(trainer.default_root_dir)
    own = Path(callback.dirpath or ".") / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
    at_epochs_ends = callback.every_n_epochs == 1 and callback._should_save_on_train_epoch_end(trainer)
    if callback.save_last and own.resolve() == file.resolve():
        callback.save_last = None
        rank_zero_info(f"ModelCheckpoint: save_last is not needed: {file} is written at every epoch's end")
    elif callback.save_last and (callback.save_top_k == 0 or callback.monitor is not None or not at_epochs_ends):
        rank_zero_info(
            f"ModelCheckpoint: with its settings {own} is not written at every epoch's end; {file} is, and "
            "--ckpt_path last takes it"
        )
    if callback._every_n_train_steps or callback._train_time_interval is not None or callback.save_on_exception:
        rank_zero_info(
            "ModelCheckpoint: every_n_train_steps, train_time_interval and save_on_exception write in the middle of an "
            f"epoch, from where no run resumes exactly: its rollout is gone; resume from {file}"
        )
