"""A LoRA's file: two that hold the same LoRA are the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LORA_FILE = "pytorch_lora_weights.safetensors"
"""As diffusers names it."""


def adapter_metadata(transformer: Any) -> dict[str, Any]:
    """PEFT's settings of a transformer's LoRA, as a file's metadata holds them; sets, whose order is random, sorted.

    Args:
        transformer: with a LoRA by `bind_lora`.
    """
    settings: dict[str, Any] = transformer.peft_config["default"].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


def sort_metadata(file: Path) -> None:
    """Sorts the metadata in a safetensors file's header: the library writes them in an order that is random.

    The header keeps its length, so that the tensors behind it stay where they are.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.safetensors"
        ...     save_file({"B": torch.ones(2)}, file, metadata={"format": "pt", "by": "PEFT"})
        ...     sort_metadata(file)
        ...     print(file.read_bytes()[8:55])
        b'{"__metadata__":{"by":"PEFT","format":"pt"},"B"'
    """
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise RuntimeError(f"{file}: its header of {size} bytes would take {len(text)}")
        stream.seek(8)
        stream.write(text)
