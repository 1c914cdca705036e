"""Weights that a reward needs: where they come from, under which licence; fetched, checked, and read once.

A folder or file of the user's own is taken as it is. Anything else is a repository on the Hugging Face hub, at a
revision, of which only the named files are fetched, through huggingface_hub's cache and its offline mode.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import HUB_NAME, download

MODEL_FILES = ("*.json", "model*.safetensors")
"""What transformers needs of a model's repository; pickled duplicates of the weights stay where they are."""
OPTIONAL_FILES = ("*.txt", "*.jinja")
"""What it reads beside them where a repository has them: vocabularies and templates."""

T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """Some files of one repository, or local ones in their place.

    Args:
        source: a hub repository `owner/name`; or a local folder that holds `files`; or, where `files` is one name, a
            local file.
        files: names or patterns; each must match something.
        licence: of the weights, as their owner states it.
        revision: branch, tag or commit on the hub.
        sha256: file name -> expected digest; checked on hub files and local ones alike.

    Example:
        >>> weights = Weights("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), "Apache-2.0")
        >>> weights.command
        'hf download xswu/HPSv2 HPS_v2.1_compressed.pt'
    """

    source: str
    files: tuple[str, ...] = MODEL_FILES
    licence: str = "not stated"
    revision: str = "main"
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command that fetches them into the cache."""
        names = [name for name in self._wanted if "*" not in name]
        patterns = [f"--include '{name}'" for name in self._wanted if "*" in name]
        revision = [] if self.revision == "main" else ["--revision", self.revision]
        return " ".join(["hf download", self.source, *names, *patterns, *revision])

    def fetch(self) -> Path:
        """Fetches what is not in the cache yet.

        Returns:
            The file if `files` is a single name, else the folder that holds them.

        Raises:
            ConfigurationError: not a repository's name and not there; missing and out of reach; another digest.
        """
        local = Path(self.source).expanduser()
        if local.is_file() and self._single:
            self._verify(local, self.files[0])
            return local
        if local.is_dir():
            return self._complete(local, f"{local} must hold it")
        if not HUB_NAME.fullmatch(self.source):
            what = f"a file, a folder with {self.files[0]}" if self._single else "a folder"
            raise ConfigurationError(f"weights: expected {what} or a hub name owner/name, got {self.source!r}")
        return self._complete(self._snapshot(local_only=False), f"fetch it by: {self.command}")

    def here(self) -> bool:
        """Whether `fetch` would need no network."""
        try:
            if not Path(self.source).expanduser().exists():
                self._complete(self._snapshot(local_only=True), "")
        except ConfigurationError:
            return False
        return True

    @property
    def _single(self) -> bool:
        return len(self.files) == 1 and "*" not in self.files[0]

    @property
    def _wanted(self) -> list[str]:
        return [*self.files, *(() if self._single else OPTIONAL_FILES)]

    def _snapshot(self, local_only: bool) -> Path:
        return download(
            self.source,
            self._wanted,
            what=f"weights {self.source} ({', '.join(self.files)})",
            command=self.command,
            revision=self.revision,
            local_only=local_only,
        )

    def _complete(self, folder: Path, cure: str) -> Path:
        """The folder, or its single file, with every file there and its digest right."""
        for pattern in (*self.files, *self.sha256):
            if not any(folder.glob(pattern)):
                raise ConfigurationError(f"weights: {pattern} of {self.source} is missing; {cure}")
        for name in self.sha256:
            self._verify(folder / name, name)
        return folder / self.files[0] if self._single else folder

    def _verify(self, file: Path, name: str) -> None:
        expected = self.sha256.get(name)
        if expected is None:
            return
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != expected:
            raise ConfigurationError(
                f"weights: {file} is not the official file: expected sha256 {expected}, got {digest}; "
                "delete it and fetch it again"
            )


def shared(load: Callable[..., T]) -> Callable[..., T]:
    """Decorates a function that reads weights: equal arguments get the same object while anybody holds it.

    So two rewards of one model, or one reward in `rewards` and in `metrics`, read the file once.

    Args:
        load: from hashable arguments to an object that can be weakly referenced, such as an nn.Module.

    Example:
        >>> import torch
        >>> layer = shared(torch.nn.Linear)
        >>> first, again, other = layer(2, 3), layer(2, 3), layer(2, 4)
        >>> first is again, first is other
        (True, False)
    """
    alive: WeakValueDictionary[tuple[object, ...], T] = WeakValueDictionary()

    @functools.wraps(load)
    def once(*arguments: object) -> T:
        found = alive.get(arguments)
        if found is None:
            alive[arguments] = found = load(*arguments)
        return found

    return once
