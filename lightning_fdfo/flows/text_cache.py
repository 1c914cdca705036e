"""Encoded texts on disk: each is encoded once for all runs, and again when anything that it depends on changes.

    FOLDER/FINGERPRINT/*.safetensors: shards of some texts each; their keys stand in the shard's header

A shard is written under another name and renamed: it is complete or not there. Several processes may write at once; a
text that two have encoded lies there twice, and either is read. Reading maps the files into memory.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import diffusers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import atomic_path
from lightning_fdfo.flows.conditioning import Conditioning

SMALL = 1 << 24
"""Bytes of a file whose content is hashed; of larger ones size and time of change."""


class TextCache:
    """Conditioning by text.

    Args:
        folder: of one fingerprint; made when something is written.

    Example:
        >>> from tempfile import mkdtemp
        >>> import torch
        >>> cache = TextCache(Path(mkdtemp()))
        >>> cache.write(["a", "b"], Conditioning({"embeds": torch.tensor([[1.0], [2.0]])}))
        >>> cache.missing(["b", "c"])
        ['c']
        >>> cache.read(["b", "a"]).tensors["embeds"].flatten()
        tensor([2., 1.])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, int]] = {}
        self._seen: set[Path] = set()

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Texts that are not here, each once, in order."""
        distinct = list(dict.fromkeys(texts))
        gone = {path for path in self._seen if not path.exists()}  # somebody has made room
        self._seen -= gone
        self._places = {key: place for key, place in self._places.items() if place[0] not in gone}
        if any(_key(text) not in self._places for text in distinct):
            self._scan()
        return [text for text in distinct if _key(text) not in self._places]

    def write(self, texts: Sequence[str], conditioning: Conditioning) -> None:
        """Adds a shard of texts and their rows.

        Raises:
            ConfigurationError: it cannot be written, for want of space, say.
        """
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in conditioning.tensors.items()}
        try:
            with atomic_path(path) as partial:
                save_file(tensors, partial, metadata={"keys": json.dumps([_key(text) for text in texts])})
        except (OSError, SafetensorError, ConfigurationError) as error:
            raise ConfigurationError(
                f"flow.text_cache: cannot write to {self.folder} ({error}); "
                "choose a folder with room, or make some; what is there can be deleted at any time"
            ) from error
        self._add(path)

    def read(self, texts: Sequence[str]) -> Conditioning:
        """Rows for texts.

        Raises:
            KeyError: a text is not here.
        """
        if missing := self.missing(texts):
            raise KeyError(f"no encoded text in {self.folder} for {missing[0]!r}")
        return Conditioning.cat([self._row(*self._places[_key(text)]) for text in texts])

    def _row(self, path: Path, row: int) -> Conditioning:
        with safe_open(path, framework="pt") as shard:
            return Conditioning({name: shard.get_slice(name)[row : row + 1] for name in shard.keys()})  # noqa: SIM118

    def _scan(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._seen:
                self._add(path)

    def _add(self, path: Path) -> None:
        """Notes what a shard holds; one that cannot be read holds nothing."""
        self._seen.add(path)
        try:
            with safe_open(path, framework="pt") as shard:
                keys = json.loads(shard.metadata()["keys"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return
        for row, key in enumerate(keys):
            self._places.setdefault(key, (path, row))


def text_fingerprint(pretrained: str, revision: str | None, parts: Sequence[str], settings: Sequence[str]) -> str:
    """Changes with whatever encoded texts depend on: files of encoders and tokenizers, settings, versions.

    Args:
        pretrained: a folder, or a hub name.
        revision: of the hub's model.
        parts: sub-folders of the encoders and tokenizers.
        settings: what else matters.

    Returns:
        32 hexadecimal digits.
    """
    facts = [f"{name} {version(name)}" for name in ("lightning-fdfo", "diffusers", "transformers", "tokenizers")]
    facts += [*settings, *_facts(Path(_local_folder(pretrained, revision)), parts)]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def _facts(folder: Path, parts: Sequence[str]) -> list[str]:
    facts = []
    for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
        status = path.stat()
        if status.st_size <= SMALL:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = f"{status.st_size} {status.st_mtime_ns}"
        facts.append(f"{path.relative_to(folder)} {content}")
    return facts


def _local_folder(pretrained: str, revision: str | None) -> str:
    """Where the model's files are here, fetched if need be."""
    if Path(pretrained).is_dir():
        return pretrained
    return str(diffusers.DiffusionPipeline.download(pretrained, revision=revision))


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
