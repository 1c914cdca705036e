"""The run's folder, which callbacks write into, and the validations that belong to a run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn


def run_folder(trainer: Trainer) -> Path:
    """Where a run's files go: `default_root_dir`, made if need be."""
    folder = Path(trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
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


def judges_a_fit(trainer: Trainer) -> bool:
    """Whether a validation belongs to `fit`, and is not the sanity check of a resumed one."""
    return trainer.state.fn == TrainerFn.FITTING and not (trainer.sanity_checking and trainer.global_step)


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it: it is whole, or as it was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_text(Path(folder) / "a.txt", "text")
        ...     print((Path(folder) / "a.txt").read_text())
        text
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
