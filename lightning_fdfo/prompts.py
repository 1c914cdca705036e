r"""Prompts: one a line (.txt), or one JSON object a line (.jsonl).

    {"prompt": "\\"427\\" in red", "negative_prompt": "blurry", "text": "427"}

Of an object, `prompt` and `negative_prompt` are the model's; everything else is metadata for the rewards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lightning_fdfo.errors import ConfigurationError


class Prompt(NamedTuple):
    """A prompt and where it came from."""

    text: str
    negative: str
    metadata: dict[str, Any]
    source: str
    """file:line, for messages"""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads a prompt file.

    Args:
        path: .txt or .jsonl, UTF-8. Empty lines are passed over.

    Raises:
        ConfigurationError: with file and line: missing, empty, not UTF-8, another ending, a line that is no prompt.
    """
    path = Path(path)
    if path.suffix not in {".txt", ".jsonl"}:
        raise ConfigurationError(f"{path}: expected a prompt file that ends in .txt or .jsonl")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"prompt file {path} cannot be read: {error.strerror}") from error
    parse = _parse_json if path.suffix == ".jsonl" else _parse_text
    prompts = []
    for number, line in enumerate(data.splitlines(), start=1):
        source = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{source}: not UTF-8 (byte {error.start + 1} of the line)") from error
        if text:
            prompts.append(parse(text, source))
    if not prompts:
        raise ConfigurationError(f"prompt file {path} is empty: expected a prompt a line")
    return prompts


def _parse_text(line: str, source: str) -> Prompt:
    return Prompt(line, "", {}, source)


def _parse_json(line: str, source: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{source}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ConfigurationError(f'{source}: expected an object with a "prompt" string, got {line[:80]}')
    prompt, negative = row.pop("prompt"), row.pop("negative_prompt", "")
    if not isinstance(negative, str):
        raise ConfigurationError(f'{source}: expected "negative_prompt" to be a string, got {negative!r}')
    return Prompt(prompt, negative, row, source)
