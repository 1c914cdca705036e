"""Which weights `validate`, `test` and `predict` judge: what `--ckpt_path` may name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.lora_contents import check_lora_file
from lightning_fdfo.flows.lora_files import LORA_FILE
from lightning_fdfo.hub import HubFiles, is_hub_name

if TYPE_CHECKING:
    pass

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
