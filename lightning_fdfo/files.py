"""Files that are complete or as they were: written aside, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_fdfo.errors import ConfigurationError


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """A temporary path beside `target`; it takes the target's place when the block ends without an exception.

    The name is hidden, ends as the target's does, and is of this process alone, so that two processes that write one
    file do not write into each other's. The data are on disk before the rename, and the file's mode follows the umask,
    whatever the library that wrote it has set.

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
    partial = target.with_name(f".partial-{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise ConfigurationError(f"{target.parent} cannot be written: {error.strerror or error}") from error
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        _sync(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(target: str | Path, text: str) -> None:
    """Writes a text file, in UTF-8: it is complete, or as it was; see `atomic_path`."""
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


def _umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(file: Path) -> None:
    """Makes a file's data last through a power failure."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
