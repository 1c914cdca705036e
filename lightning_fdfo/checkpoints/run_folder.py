"""The run's folder, which callbacks write into, and the validations that belong to a run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_fdfo.checkpoints.run_owner import RunOwner, trial_folder
from lightning_fdfo.errors import ConfigurationError


def run_folder(trainer: Trainer) -> Path:
    """Where a callback writes: `default_root_dir`, made if need be and claimed in `fit`; not with `fast_dev_run`.

    Raises:
        ConfigurationError: it cannot be made, or another process trains into it; see `RunOwner`.
    """
    folder = Path(trainer.default_root_dir)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        folder = trial_folder()
    elif trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero:
        for owner in (callback for callback in trainer.callbacks if isinstance(callback, RunOwner)):  # type: ignore[attr-defined]
            if owner.claim(folder):
                owner.begin(trainer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def numbered_folder(parent: Path) -> Path:
    """A new folder `0`, `1`, … below a parent: the first number that is above all there are.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     [numbered_folder(Path(folder) / "test").name for _ in range(2)]
        ['0', '1']
    """
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) + 1 for path in parent.iterdir() if path.name.isdecimal()), default=0)
    while True:
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:  # another process was quicker
            number += 1
        else:
            return parent / str(number)


def is_inside(path: str) -> bool:
    """Whether a path leads to something below the folder that it is joined to.

    Example:
        >>> is_inside("lora/final"), is_inside("../lora"), is_inside("/tmp/lora"), is_inside(".")
        (True, False, False, False)
    """
    return bool(Path(path).parts) and not Path(path).is_absolute() and ".." not in Path(path).parts


def belongs_to_fit(trainer: Trainer) -> bool:
    """Whether a validation belongs to `fit`, and is not the sanity check of a resumed one."""
    return trainer.state.fn == TrainerFn.FITTING and not (trainer.sanity_checking and trainer.global_step)
