"""Which adapter serves which pipeline: found by the class that a folder's `model_index.json` names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import download, is_hub_name


class Adapter:
    """Enters its subclasses here by the pipelines that they serve; a class that serves none gives the one that does."""

    registered: ClassVar[dict[str, type[Adapter]]] = {}
    """Name of a pipeline class in diffusers -> adapter."""
    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    """Names in diffusers of the pipelines that an adapter serves."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in cls.__dict__.get("pipeline_classes", ()):  # an heir does not take its parent's place
            Adapter.registered[name] = cls

    def __new__(cls, *args: Any, **options: Any) -> Adapter:
        """An instance of the class, or of the adapter that serves the pipeline if the class serves none."""
        if cls.pipeline_classes:
            return super().__new__(cls)
        pretrained = args[0] if args else options["pretrained"]
        return super().__new__(adapter_for(pretrained, options.get("revision")))


def adapter_for(pretrained: str, revision: str | None = None) -> type[Adapter]:
    """The adapter that serves a folder's or hub model's pipeline.

    Args:
        pretrained: a shipped model, a folder or a hub name.
        revision: branch, tag or commit on the hub.

    Raises:
        ConfigurationError: there is none, or `model_index.json` cannot be had.

    Example:
        >>> import lightning_fdfo.flows
        >>> adapter_for("tiny-digits").__name__
        'StableDiffusion3'
    """
    name = read_index(resolve_pretrained(pretrained), revision)["_class_name"]
    if name not in Adapter.registered:
        raise ConfigurationError(
            f"flow.pretrained: {pretrained} holds a {name}, which no adapter serves; there are adapters for "
            f"{', '.join(sorted(Adapter.registered))}; docs/adapters.md says how to write one"
        )
    return Adapter.registered[name]


def resolve_pretrained(pretrained: str) -> str:
    """The folder of a shipped model's name, else the name itself (a folder or a hub name).

    Example:
        >>> resolve_pretrained("stabilityai/stable-diffusion-3.5-medium")
        'stabilityai/stable-diffusion-3.5-medium'
        >>> Path(resolve_pretrained("tiny-digits")).name
        'tiny-digits'
    """
    shipped = Path(str(files("lightning_fdfo.assets"))) / pretrained
    return str(shipped) if (shipped / "model_index.json").is_file() else pretrained


def read_index(pretrained: str, revision: str | None) -> dict[str, Any]:
    """`model_index.json` of a folder or of a model on the hub.

    Raises:
        ConfigurationError: it cannot be had, or is no pipeline's.
    """
    folder = model_folder(pretrained, revision, ["model_index.json"])
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"flow.pretrained: {pretrained} is no diffusers pipeline: cannot read its model_index.json ({error}); "
            "name the folder that DiffusionPipeline.save_pretrained has written, or download the model again"
        ) from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ConfigurationError(f"flow.pretrained: {pretrained}/model_index.json names no pipeline class")
    return index


def model_folder(pretrained: str, revision: str | None, files: Sequence[str]) -> Path:
    """A folder that holds some of a model's files: its own, or the hub's cache, into which they are fetched.

    Args:
        pretrained: a folder or a hub name.
        revision: branch, tag or commit on the hub.
        files: names or patterns; what a repository lacks of them is not there.

    Raises:
        ConfigurationError: neither a folder nor a hub name, or they cannot be fetched.
    """
    if is_folder(pretrained):
        return Path(pretrained)
    if not is_hub_name(pretrained):
        raise ConfigurationError(
            f"flow.pretrained: expected a shipped model (tiny-digits), a folder or a hub name like "
            f"'owner/model', got {pretrained!r}, which is none of these"
        )
    what = f"flow.pretrained: {pretrained}: its files"
    return download(pretrained, files, what=what, command=download_command(pretrained, revision), revision=revision)


def is_folder(pretrained: str) -> bool:
    """Whether it is a folder, also one that may not be looked into."""
    try:
        return Path(pretrained).is_dir()
    except OSError:
        return True


def download_command(pretrained: str, revision: str | None) -> str:
    """What fetches a model into the hub's cache.

    Example:
        >>> download_command("owner/name", "v2")
        'hf download owner/name --revision v2'
    """
    return f"hf download {pretrained}" + (f" --revision {revision}" if revision else "")
