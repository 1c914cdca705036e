"""Relative paths of a configuration: looked up from the current folder, then from where its file lies.

So `lightning-fdfo fit --config /elsewhere/configs/quickstart.yaml` finds its prompts from any folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_fdfo.errors import ConfigurationError

PROMPTS = {
    "data.train": ("fit",),
    "data.val": ("fit", "validate"),
    "data.test": ("test",),
    "data.predict": ("predict",),
}
"""Prompt files, and the commands that cannot do without."""
LORA = "model.lora.init_lora"
MODEL = "model.flow.init_args.pretrained"
"""A folder, if there is one: else the name of a shipped model, or of one on the hub."""


def find(value: str, folders: Sequence[Path]) -> str | None:
    """The first of `value` itself and `folder / value` that exists; None if none does.

    Example:
        >>> find("tiny-digits", [Path("nowhere")]) is None
        True
    """
    candidates = [Path(value), *(folder / value for folder in folders)]
    return next((str(path) for path in candidates if path.exists()), None)


def resolve_paths(config: Any, files: Sequence[Path], command: str | None) -> None:
    """Replaces relative paths by those that exist.

    A file given later is asked first: it overrides the earlier ones. Beside a file means its folder, and the folder
    above it: the shipped configurations name their prompts from there.

    Args:
        config: the parsed configuration of a command; changed in place.
        files: configuration files, in the order of the command line.
        command: `fit`, …; None for the doctor, which wants what `fit` does.

    Raises:
        ConfigurationError: a file that the command needs is in none of these folders.
    """
    folders = list(dict.fromkeys(folder for file in reversed(files) for folder in (file.parent, file.parent.parent)))
    for key in (*PROMPTS, LORA, MODEL):
        value = _get(config, key)
        if not isinstance(value, str) or Path(value).is_absolute():
            continue
        found = find(value, folders)
        if found is not None:
            if found != value:
                config[key] = found
        elif key == LORA or (command or "fit") in PROMPTS.get(key, ()):
            looked = ", ".join(str(folder.absolute()) for folder in dict.fromkeys([Path(), *folders]))
            raise ConfigurationError(f"{key}: {value} cannot be read: No such file in {looked}")


def _get(config: Any, key: str) -> Any:
    """A value of nested namespaces; None where a part of the path is none, or no namespace."""
    for part in key.split("."):
        if config is None or isinstance(config, str):
            return None
        config = config.get(part)
    return config
