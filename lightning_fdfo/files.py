"""Atomic writes: a file or folder is complete or unchanged, because it is written under another name, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_fdfo.errors import ConfigurationError

PARTIALS = ".*.partial-*"
"""Names of files that are being written; a killed process leaves them."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """A temporary path beside `target`; it takes the target's place when the block ends without an exception.

    The name is hidden, has another ending, and is of this process alone, so that two processes that write one file do
    not write into each other's. The data are on disk before the rename, and the file's mode follows the umask, whatever
    the library that wrote it has set.

    Args:
        target: the file to write; folders above it are made.

    Yields:
        The path to write to.

    Raises:
        ConfigurationError: the folder cannot be made or written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "new" / "a.txt"
        ...     with atomic_path(file) as partial:
        ...         _ = partial.write_text("text")
        ...     print(file.read_text(), [path.name for path in file.parent.iterdir()])
        text ['a.txt']
    """
    target = Path(target)
    partial = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    try:
        yield partial
        _follow_umask(partial)
        _sync(partial)
        partial.replace(target)
        with suppress(OSError):  # not every file system can; the rename then lasts through a power failure, too
            _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """The same for a new folder: it appears complete, with modes that follow the umask, or not at all.

    Args:
        target: a folder that is not there, or is empty; folders above it are made.

    Yields:
        The folder to fill.

    Raises:
        ConfigurationError: it cannot be made or written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with atomic_folder(Path(folder) / "new") as partial:
        ...         _ = (partial / "a.txt").write_text("text")
        ...     print((Path(folder) / "new" / "a.txt").read_text())
        text
    """
    target = Path(target)
    partial = _beside(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            _follow_umask(path)
        partial.replace(target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(target: str | Path, text: str) -> None:
    """Writes a text file, in UTF-8: it is complete, or as it was; see `atomic_path`."""
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


def file_digest(file: Path) -> str:
    """A file's SHA-256, as 64 hexadecimal digits; the file is read piece by piece."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_first_process() -> bool:
    """Whether this process writes what all processes of a run have: the first of those that are connected, or alone.

    torch.distributed knows; it is not imported here.

    Example:
        >>> is_first_process()
        True
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return True
    return bool(distributed.get_rank() == 0)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"{path} cannot be written: {error.strerror or error}")


def _follow_umask(path: Path) -> None:
    """Gives a file the mode that `open` would have given it; safetensors, for one, writes for the owner alone."""
    if path.is_file():
        mask = os.umask(0)  # it can be read only by setting it
        os.umask(mask)
        path.chmod(0o666 & ~mask)


def _sync(path: Path) -> None:
    """Makes a file's data, or a folder's names, last through a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def format_bytes(size: float) -> str:
    """Bytes for people, in units of 1024: what a card of "24 GB" has is 24 GiB.

    Args:
        size: bytes, >= 0.

    Example:
        >>> format_bytes(500), format_bytes(1536), format_bytes(24 * 1024**3)
        ('500 B', '1.5 KiB', '24.0 GiB')
    """
    power = 0
    while size >= 1024 and power < len(UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.1f} {UNITS[power]}" if power else f"{size:.0f} B"
