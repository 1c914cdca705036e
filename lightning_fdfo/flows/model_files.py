"""A pipeline's files: what can be known without its weights, and whether the weights that were loaded are all there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import download, is_hub_name

UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, UnpicklingError, SafetensorError),
    *(RuntimeError, ImportError),
)
"""What diffusers and transformers raise for a folder that is not what its index says."""
CONFIGURATION = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/*.json")
"""Small files that say what can be known without weights."""
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "tekken.json", "*.tiktoken")
"""Files of which a tokenizer has one at least."""
MAX_NAMES = 3
"""Missing tensors that are named one by one."""


def described(index: Mapping[str, Any], folder: Path, name: str) -> nn.Module:
    """A part of the pipeline by its configuration, on the meta device.

    Args:
        index: `model_index.json`.
        folder: that holds the part's configuration.
        name: of the part.
    """
    part = getattr(diffusers, index[name][1])
    with torch.device("meta"):
        module: nn.Module = part.from_config(part.load_config(str(folder), subfolder=name))
    return module


def text_encoders(
    index: Mapping[str, Any], pretrained: str, names: Sequence[str], **options: Any
) -> Iterator[tuple[str, nn.Module]]:
    """Loads text encoders by transformers, as the pipeline would, which says nothing of tensors that it made up.

    Args:
        index: `model_index.json`.
        pretrained: a folder or a hub name.
        names: of the pipeline's parts; those that the index lacks, or that are not by transformers, are left out.
        **options: of `from_pretrained`.

    Raises:
        ConfigurationError: weights lack a tensor.
    """
    for name in names:
        library, class_name = index.get(name) or (None, "")
        if library != "transformers":
            continue
        kind = getattr(transformers, class_name)
        module, found = kind.from_pretrained(
            pretrained,
            subfolder=name,
            trust_remote_code=False,  # left out, transformers would ask on the terminal
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
        check_complete(pretrained, name, [key for key in found["missing_keys"] if "lm_head" not in key])
        for key, given, expected in sorted(found["mismatched_keys"]):
            raise ConfigurationError(
                f"flow.pretrained: {pretrained}/{name} is no model that can be read: {key} has the shape "
                f"{list(given)}, its configuration says {list(expected)}; the files are of two models: "
                "download or save them again"
            )
        yield name, module


def check_parts(index: Mapping[str, Any], folder: Path) -> None:
    """Raises ConfigurationError if a folder lacks a part that its index names.

    Without its files a tokenizer would be an empty one, of which nothing is said.
    """
    for name, part in index.items():
        if not isinstance(part, list) or part[0] is None:
            continue
        present = sorted(path.name for path in (folder / name).iterdir()) if (folder / name).is_dir() else []
        words = [file for file in present if any(fnmatch(file, pattern) for pattern in VOCABULARIES)]
        if not present or ("tokenizer" in name and not words):
            raise ConfigurationError(
                f"flow.pretrained: {folder} lacks {name}{'' if not present else ': it holds no vocabulary'}, which its "
                "model_index.json names; it is half downloaded: download or save it again, all of it"
            )


def meta_tensors(module: nn.Module) -> list[str]:
    """Names of the tensors that a module has been given no numbers for."""
    return [name for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_meta]


def check_complete(pretrained: str, part: str, missing: Sequence[str]) -> None:
    """Raises ConfigurationError that names the tensors that a part's weights lack, if there are any.

    Example:
        >>> check_complete("folder", "vae", [])
    """
    if not missing:
        return
    names = ", ".join(sorted(missing)[:MAX_NAMES])
    more = len(missing) - MAX_NAMES
    count = f"{len(missing)} tensors" if len(missing) > 1 else "a tensor"
    raise ConfigurationError(
        f"flow.pretrained: {pretrained}/{part}: its weights lack {count}: {names}"
        f"{f' and {more} more' if more > 0 else ''}; the files are another model's, or half "
        "downloaded: download or save them again"
    )


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
