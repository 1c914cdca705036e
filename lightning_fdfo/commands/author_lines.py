"""The part of a reward's traceback that lies in its author's code: the command line shows it."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from lightning_fdfo.errors import RewardError

_FRAMEWORK = {"lightning_fdfo", "lightning", "lightning_fabric", "pytorch_lightning", "torch"}
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_INSTALLED = {"site-packages", "dist-packages"}


def author_lines(error: RewardError) -> Iterator[str]:
    """Lines of the traceback of what the reward raised, without our frames and those of libraries; maybe none."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    frames = _author_frames(cause)
    if frames:
        yield from frames.format()
        yield from traceback.format_exception_only(cause)


def _author_frames(error: BaseException) -> traceback.StackSummary:
    """Frames of the package that was called first, and of files that are not installed."""
    walked = list(traceback.walk_tb(error.__traceback__))
    packages = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame, _ in walked]
    foreign = [
        (summary, package)
        for summary, package in zip(traceback.StackSummary.extract(walked), packages, strict=True)
        if package not in _FRAMEWORK and not _is_standard(summary.filename)
    ]
    author = foreign[0][1] if foreign else None
    kept = [summary for summary, package in foreign if package == author or not _is_installed(summary.filename)]
    return traceback.StackSummary.from_list(kept)


def _is_standard(filename: str) -> bool:
    return filename.startswith("<") or (
        Path(filename).is_relative_to(_STANDARD_LIBRARY) and not _is_installed(filename)
    )


def _is_installed(filename: str) -> bool:
    return bool(_INSTALLED & set(Path(filename).parts))
