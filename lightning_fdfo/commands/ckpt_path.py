"""What `--ckpt_path` names: a checkpoint, the last one of a run, or a LoRA to evaluate."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lightning_fdfo.checkpoints.last_checkpoint import find_last
from lightning_fdfo.checkpoints.run_owner import MARK
from lightning_fdfo.commands.run_record import RECORD
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.lora_contents import check_lora_file
from lightning_fdfo.flows.lora_files import LORA_FILE
from lightning_fdfo.hub import HubFiles, is_hub_name

EXPECTED = (
    "expected a checkpoint's file, or last, or a LoRA: a .safetensors file, a folder with "
    f"{LORA_FILE}, or a hub name like owner/name or owner/name/FILE.safetensors"
)


def find_lora(ckpt_path: str) -> Path | None:
    """The LoRA file that `--ckpt_path` names, fetched from the hub if need be; None for a checkpoint's file.

    Args:
        ckpt_path: a file, a folder, or a hub name.

    Raises:
        ConfigurationError: it is none of these, cannot be fetched, is no safetensors file, or not finite.
    """
    path = Path(ckpt_path).expanduser()
    if path.is_dir():
        if not (path / LORA_FILE).is_file():
            raise ConfigurationError(f"--ckpt_path: {EXPECTED}; {path} holds no {LORA_FILE}{_inside(path)}")
        path = path / LORA_FILE
    elif not path.is_file():
        path = _from_hub(ckpt_path)
    elif path.suffix != ".safetensors":
        return None
    check_lora_file(path, "--ckpt_path")
    return path


def _inside(folder: Path) -> str:
    """What one may have meant in a run's folder."""
    likely = (folder / "lora" / LORA_FILE, folder / "checkpoints" / "last.ckpt")
    found = [str(path) for path in likely if path.is_file()]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _from_hub(name: str) -> Path:
    """The LoRA file of `owner/name`, or of `owner/name/FILE.safetensors`."""
    parts = name.split("/")
    names_file = name.endswith(".safetensors") and len(parts) > 2
    source, file = ("/".join(parts[:2]), "/".join(parts[2:])) if names_file else (name, LORA_FILE)
    if not is_hub_name(source) or name.endswith(".ckpt"):
        raise ConfigurationError(f"--ckpt_path: {EXPECTED}; got {name}")
    try:
        return HubFiles(source, (file,)).fetch()
    except ConfigurationError as error:
        raise ConfigurationError(f"--ckpt_path: {name} is no file or folder here; on the hub, {error}") from error


def check_ckpt_path(ckpt_path: str | None) -> None:
    """Raises ConfigurationError for what `fit` cannot resume from: no file, or a LoRA."""
    if ckpt_path and ckpt_path != "last" and not Path(ckpt_path).is_file():
        raise ConfigurationError(f"--ckpt_path: expected a file, or last, got {ckpt_path}")
    if str(ckpt_path).endswith(".safetensors"):
        raise ConfigurationError(
            f"--ckpt_path: expected a checkpoint, got {ckpt_path}; start from a LoRA by --model.lora.init_lora"
        )


def find_last_checkpoint(folder: Path, command: str) -> Path | None:
    """What `--ckpt_path last` names; None, which is logged, if the run has no checkpoint yet.

    Args:
        folder: the run's.
        command: `fit`, …

    Raises:
        ConfigurationError: there is no run, its last.ckpt is gone, or there is nothing to evaluate.
    """
    file = find_last(folder)
    if file is None and command != "fit":
        raise ConfigurationError(
            f"--ckpt_path last: {folder} holds no checkpoint; name the run's folder by --trainer.default_root_dir, "
            "or a file"
        )
    if file is None and not any((folder / name).exists() for name in (MARK, RECORD)):
        raise ConfigurationError(
            f"--ckpt_path last: {folder} holds no run to resume; leave --ckpt_path out to begin one"
        )
    if file is None:
        rank_zero_info(f"The run in {folder} was ended before its first checkpoint: it starts again from epoch 0")
    return file
