"""Checkpoints on disk: complete or absent, checked when they are read, and read without running code."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import atomic_path, format_bytes
from lightning_fdfo.flows.lora_files import LORA_FILE

LIGHTNINGS = {"state_dict": dict, "pytorch-lightning_version": str}
"""What every checkpoint of Lightning's holds."""
MAX_NAMED = 3
"""Checkpoints that an error names in another's place."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's own format, on a local disk; a file is complete or not there, and is read without running code.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> io, checkpoint = SafeCheckpointIO(), {"state_dict": {}, "pytorch-lightning_version": "2.6.0"}
        >>> with TemporaryDirectory() as folder:
        ...     io.save_checkpoint(checkpoint, f"{folder}/a.ckpt")
        ...     print([file.name for file in Path(folder).iterdir()])
        ...     print(io.load_checkpoint(f"{folder}/a.ckpt") == checkpoint)
        ['a.ckpt']
        True
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Writes `path` under a temporary name, syncs it and renames it: a killed process leaves the old file, or none.

        Raises:
            ConfigurationError: it cannot be written, for want of space, say; the old file is as it was.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options: expected None for a local disk, got {storage_options!r}")
        target = Path(path)
        try:
            with atomic_path(target) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError, ConfigurationError) as error:
            reason = _writing_problem(error)
            if reason is None:
                raise
            raise ConfigurationError(
                f"checkpoint {target} cannot be written: {reason}; it needs about "
                f"{format_bytes(num_bytes(checkpoint))}, and {_free(target.parent)} are free there. "
                f"Earlier checkpoints are complete: make room, then resume by "
                "--ckpt_path last"
            ) from error

    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads `path` with `weights_only=True`, whatever is asked for.

        Raises:
            ConfigurationError: it is missing, damaged or no checkpoint, or holds what only its own code could load.
        """
        file = Path(path)
        if file.suffix == ".safetensors" or (file / LORA_FILE).is_file():
            lora = file if file.suffix else file / LORA_FILE
            raise ConfigurationError(
                f'{file} is a LoRA, no checkpoint: set a new module\'s lora_file to Path("{lora}") to validate, test '
                "or predict with it, or give LoRA(init_lora=...) to train on from it"
            )
        try:
            _check_archive(file)
            checkpoint: dict[str, Any] = torch.load(file, map_location=map_location or "cpu", weights_only=True)
            for name, kind in LIGHTNINGS.items():
                if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), kind):
                    raise ValueError(f"it is no Lightning checkpoint: it has no {name}")
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = found[1] if found else "a Python object"
            raise _refused(file, f"it holds {what}, which only code of its own could load") from error
        except Exception as error:  # torch raises many kinds for a file that is something else
            raise _refused(file, str(error).partition("\n")[0] or type(error).__name__) from error
        return checkpoint


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in nested mappings and sequences.

    Example:
        >>> num_bytes({"weights": {"B": torch.zeros(8, 4)}, "steps": [torch.zeros(2), 3]})
        136
    """
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(num_bytes(item) for item in value)


def _writing_problem(error: BaseException) -> str | None:
    """What the disk says; torch's writer may have put an error of its own over it."""
    under: BaseException | None = error
    while under is not None and not isinstance(under, OSError):
        under = under.__cause__ or under.__context__
    if under is not None:
        return under.strerror or str(under)
    torn = re.search("PytorchStreamWriter|inline_container|iostream", str(error))
    return str(error).partition("\n")[0] if torn else None


def _free(folder: Path) -> str:
    with suppress(OSError):
        return format_bytes(shutil.disk_usage(folder).free)
    return "unknown"


def _check_archive(file: Path) -> None:
    """Raises ValueError unless a file is as torch writes them: a zip, not compressed, its checksums right.

    torch itself does not compare checksums.
    """
    if not file.is_file():
        raise ValueError("it is no file" if file.exists() else "it is not there")
    try:
        with ZipFile(file) as archive:
            compressed = any(entry.compress_type != ZIP_STORED for entry in archive.infolist())
            damaged = None if compressed else archive.testzip()
    except BadZipFile as error:
        raise ValueError(f"it is cut short, or no checkpoint (it has {format_bytes(file.stat().st_size)})") from error
    if compressed or damaged:
        raise ValueError(f"it is damaged: {damaged} has another checksum" if damaged else "it is no checkpoint")


def _refused(file: Path, reason: str) -> ConfigurationError:
    """With the newest other checkpoints of the folder as a hint."""
    others = [other for other in file.parent.glob("*.ckpt") if other.is_file() and other.name != file.name]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    named = ", ".join(other.name for other in others[:MAX_NAMED])
    hint = f"resume from another one in its folder by --ckpt_path FILE: {named}" if named else "there is none beside it"
    return ConfigurationError(f"checkpoint {file} cannot be loaded: {reason}; {hint}")
