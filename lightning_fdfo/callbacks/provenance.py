"""Which weights made a folder of images or a table: the base model, and the file that was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_fdfo.files import file_digest

if TYPE_CHECKING:
    from lightning_fdfo.module import FDFOModule


def describe_weights(trainer: Trainer, module: FDFOModule) -> dict[str, str]:
    """Where the weights of a `validate`, `test` or `predict` come from.

    Returns:
        `base`, the base model; `weights`, the name of the file that was loaded on top; `sha256`, of that file, if there
        is one. A local file or folder is named without the folders above it.
    """
    pretrained = str(getattr(module.flow, "pretrained", type(module.flow).__name__))
    base = {"base": Path(pretrained).name if Path(pretrained).exists() else pretrained}
    file = module.lora_file or (Path(trainer.ckpt_path) if trainer.ckpt_path else None)
    if file is None:
        given = module.lora.init_lora if module.lora is not None else None
        if given is None:
            return base | {"weights": "the base model's"}
        file = Path(given)
    return base | {"weights": file.name, "sha256": file_digest(file)}
