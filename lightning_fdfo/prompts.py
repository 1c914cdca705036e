r"""Prompts: one per line (.txt), or one JSON object per line (.jsonl).

    {"prompt": "\"427\" in red", "negative_prompt": "blurry", "text": "427"}

Of an object, `prompt` and `negative_prompt` are the model's; everything else is metadata for the rewards. A file may
come from anywhere: what is no text, or no plain JSON, is refused with its line, and nothing is read beyond it.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lightning_fdfo.errors import ConfigurationError

MAX_LINE = 100_000
"""Characters of a line."""
MAX_DEPTH = 50
"""Lists and objects within each other in a line of JSON."""
MAX_DIGITS = 100
"""Digits of an integer in JSON."""

NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""What no text holds: control characters but tab and line ends, and halves of a UTF-16 pair."""
_SUSPECT = re.compile(r"\\[ubf]")
"""How JSON writes control characters: only lines with one of these are searched for them."""


class Prompt(NamedTuple):
    """A prompt and where it came from."""

    text: str
    negative: str
    metadata: dict[str, Any]
    source: str
    """file:line, for messages"""


class IndexedPrompt(NamedTuple):
    """A prompt to generate an image for; the image's latents are a function of `prompt_index` and `repeat`."""

    prompt_index: int
    """In its file, from 0."""
    prompt: Prompt
    counted: bool = True
    """False for one that only keeps a device busy while the others generate theirs."""
    repeat: int = 0
    """Which of the prompt's images."""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads a prompt file.

    Args:
        path: .txt or .jsonl, UTF-8. Empty lines are passed over.

    Raises:
        ConfigurationError: with file and line: missing, no file, empty, not UTF-8, another ending, a line that is no
            prompt, is longer than `MAX_LINE`, or holds control characters.
    """
    path = Path(path)
    if path.suffix not in {".txt", ".jsonl"}:
        raise ConfigurationError(f"{path}: expected a prompt file that ends in .txt or .jsonl")
    parse = _parse_json if path.suffix == ".jsonl" else _parse_text
    try:
        _check_kind(path)
        prompts = [parse(line, source) for line, source in _lines(path)]
    except OSError as error:
        raise ConfigurationError(f"prompt file {path} cannot be read: {error.strerror}") from error
    if not prompts:
        raise ConfigurationError(f"prompt file {path} is empty: expected a prompt per line")
    return prompts


def _check_kind(path: Path) -> None:
    """Raises ConfigurationError for what is no file: a pipe would be waited for, a device might never end."""
    mode = path.stat().st_mode
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe (FIFO)", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(mode):
        raise ConfigurationError(
            f"{path}: expected a prompt file, got {kinds.get(stat.S_IFMT(mode), 'a device')}: save its lines in a file"
        )


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not empty, and their `file:line`; no more than one line is held at a time."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:  # bytes that are not UTF-8 become half pairs
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            source = f"{path}:{number}"
            if len(line) > MAX_LINE and not line.endswith("\n"):
                raise ConfigurationError(f"{source}: expected at most {MAX_LINE} characters a line")
            if found := NO_TEXT.search(line):
                place = len(line[: found.start()].encode()) + 1
                if found[0] >= "\ud800":
                    raise ConfigurationError(f"{source}: not UTF-8 (byte {place} of the line)")
                raise ConfigurationError(f"{source}: {_named(found[0])} (byte {place} of the line) is no text")
            if text := line.lstrip("\ufeff").strip():
                yield text, source


def _parse_text(line: str, source: str) -> Prompt:
    return Prompt(line, "", {}, source)


def _parse_json(line: str, source: str) -> Prompt:
    try:
        row = _DECODER.decode(line)
        if _SUSPECT.search(line) or line.count("[") + line.count("{") > MAX_DEPTH:
            _check_strings(row)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{source}: not JSON: {error}") from error
    except RecursionError as error:
        raise ConfigurationError(f"{source}: not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise ConfigurationError(f"{source}: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ConfigurationError(f'{source}: expected an object with a "prompt" string, got {line[:80]}')
    prompt, negative = row.pop("prompt"), row.pop("negative_prompt", "")
    if not isinstance(negative, str):
        raise ConfigurationError(f'{source}: expected "negative_prompt" to be a string, got {repr(negative)[:80]}')
    return Prompt(prompt, negative, row, source)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"expected each key once, got {twice[:80]!r} twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"expected numbers of at most {MAX_DIGITS} digits, got one of {len(digits)}")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"expected finite numbers, got {digits[:80]}")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
)


def _check_strings(value: Any, depth: int = 0) -> None:
    """Raises ValueError for strings with control characters, which JSON can write by their numbers."""
    if isinstance(value, str):
        if found := NO_TEXT.search(value):
            raise ValueError(f"{_named(found[0])} in a string is no text")
    elif isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            raise ValueError(f"expected at most {MAX_DEPTH} lists and objects within each other")
        for item in value:
            _check_strings(item, depth + 1)
            if isinstance(value, dict):
                _check_strings(value[item], depth + 1)


def _named(character: str) -> str:
    return f"character U+{ord(character):04X}"
