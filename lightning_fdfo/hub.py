"""Files from the Hugging Face hub, through its cache; and, in one sentence, why they cannot be had and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_fdfo.errors import ConfigurationError

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""`owner/name`."""
COPY = "fetch them where there is a network, then copy the cache"


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
        >>> told = out_of_reach(OfflineModeIsEnabled("x"), "a/b", None, what="weights a/b", command="hf download a/b")
        >>> told[:58]
        'weights a/b are not in the cache and cannot be fetched (of'
    """
    reason, cure = _why(error, source, revision)
    return f"{what} are not in the cache and cannot be fetched ({reason}); {cure}: {command}"


def is_hubs(error: BaseException) -> bool:
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
