"""Files of the Hugging Face hub: their names and licence, fetched through its cache; and which names are hub names.

`HubFiles` names files of one repository, or a local file or folder in their place. If they cannot be fetched, the error
says in one sentence why, and what to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import file_digest

COPY = "fetch them where there is a network, then copy the cache"


def is_hub_name(name: str) -> bool:
    """Whether it can be a repository's name, `owner/name`, by the hub's own rule.

    Example:
        >>> is_hub_name("stabilityai/stable-diffusion-3.5-medium"), is_hub_name("tiny-digits"), is_hub_name("a/b/c")
        (True, False, False)
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # the rule also allows a name without an owner


def download(
    source: str, patterns: Sequence[str], *, what: str, command: str, revision: str | None, local_only: bool = False
) -> Path:
    """The folder of the cache that holds a repository's files; asks the network once, without trying again.

    Args:
        source: `owner/name`.
        patterns: names or patterns of files.
        what: is wanted, for messages, in the plural.
        command: that fetches it.
        revision: branch, tag or commit; None for the main branch.
        local_only: whether to ask the cache alone.

    Raises:
        ConfigurationError: they are not in the cache, and offline, gated, not there or out of reach.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=list(patterns), local_files_only=local_only)
        )
    except Exception as error:  # no network, no such repository or revision, no access, a proxy's own errors
        raise ConfigurationError(out_of_reach(error, source, revision, what=what, command=command)) from error


def out_of_reach(error: BaseException, source: str, revision: str | None, *, what: str, command: str) -> str:
    """The sentence for an error of the hub: what is missing, why, and what to do.

    Args:
        error: by huggingface_hub, or one that it caused.
        source: `owner/name`.
        revision: that was asked for.
        what: is wanted, in the plural.
        command: that fetches it.

    Example:
        >>> from huggingface_hub.errors import OfflineModeIsEnabled
        >>> error = OfflineModeIsEnabled("x")
        >>> out_of_reach(error, "a/b", None, what="weights a/b", command="hf download a/b")[:58]
        'weights a/b are not in the cache and cannot be fetched (of'
    """
    reason, hint = _why(error, source, revision)
    return f"{what} are not in the cache and cannot be fetched ({reason}); {hint}: {command}"


def is_hub_error(error: BaseException) -> bool:
    """Whether the hub, or the way to it, is behind an error."""
    from huggingface_hub import errors

    hubs = (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    return any(isinstance(one, hubs) or _is_network(one) for one in _chain(error))


def _why(error: BaseException, source: str, revision: str | None) -> tuple[str, str]:
    """The reason, and what to do before the command helps."""
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    page = f"https://huggingface.co/{source}"

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if has(errors.GatedRepoError):
        return f"{source} is gated", f"accept its licence on {page}, then `hf auth login` and"
    if has(errors.RevisionNotFoundError):
        return f"{source} has no revision {revision}", f"see {page} for those that there are, then"
    if has(errors.RepositoryNotFoundError):
        return f"the hub has no {source}, or it is private", "check the name, or `hf auth login`, then"
    if constants.HF_HUB_OFFLINE or has(errors.OfflineModeIsEnabled):
        return "offline mode is on: HF_HUB_OFFLINE=1", COPY
    status = next((one.response.status_code for one in chain if isinstance(one, errors.HfHubHTTPError)), None)
    if status in (401, 403):
        return f"the hub refuses access, status {status}", "`hf auth login` with a token that may read it, then"
    if status is not None:
        return f"the hub answers with status {status}", "try again later by"
    if any(_is_network(one) for one in chain):
        return f"no network: {_first_line(chain[-1])}", COPY
    return _first_line(error), COPY


def _is_network(error: BaseException) -> bool:
    """Errors of httpx in whatever version huggingface_hub has, of requests, and of sockets."""
    if type(error).__name__ == "OfflineModeIsEnabled":  # a ConnectionError by class
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(names & {"TransportError", "gaierror"})


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


MODEL_FILES = ("*.json", "model*.safetensors")
"""What transformers needs of a model's repository, without pickled duplicates of the weights."""
OPTIONAL_FILES = ("*.txt", "*.jinja")
"""Vocabularies and templates: fetched too, if the repository has them."""


T = TypeVar("T")


@dataclass(frozen=True)
class HubFiles:
    """Some files of one repository, or local ones in their place.

    Args:
        source: a hub repository `owner/name`; or a local folder that holds `files`; or, where `files` is one name, a
            local file.
        files: names or patterns; each must match something.
        licence: of the weights, as their owner states it.
        revision: branch, tag or commit on the hub.
        sha256: file name -> expected digest; checked on hub files and local ones alike.

    Example:
        >>> HubFiles("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), "Apache-2.0").command
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
        if not is_hub_name(self.source):
            what = f"a file, a folder with {self.files[0]}" if self._single else "a folder"
            raise ConfigurationError(f"weights: expected {what} or a hub name owner/name, got {self.source!r}")
        return self._complete(self._snapshot(local_only=False), f"fetch it by: {self.command}")

    def is_cached(self) -> bool:
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

    def _complete(self, folder: Path, hint: str) -> Path:
        """The folder, or its single file, with every file there and its digest right."""
        for pattern in (*self.files, *self.sha256):
            if not any(folder.glob(pattern)):
                raise ConfigurationError(f"weights: {pattern} of {self.source} is missing; {hint}")
        for name in self.sha256:
            self._verify(folder / name, name)
        return folder / self.files[0] if self._single else folder

    def _verify(self, file: Path, name: str) -> None:
        expected = self.sha256.get(name)
        if expected is None:
            return
        digest = file_digest(file)
        if digest != expected:
            raise ConfigurationError(
                f"weights: {file} is not the official file: expected sha256 {expected}, got {digest}; "
                "delete it and fetch it again"
            )


def cached_weak(load: Callable[..., T]) -> Callable[..., T]:
    """Decorates a function that reads weights: calls with equal arguments share one object, for as long as it is used.

    Two rewards of one model, or one reward in `rewards` and in `evaluation.metrics`, read the file once. The cache
    holds weak references: it keeps nothing alive.

    Args:
        load: from hashable arguments to an object that can be weakly referenced, such as an nn.Module.

    Example:
        >>> import torch
        >>> layer = cached_weak(torch.nn.Linear)
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
