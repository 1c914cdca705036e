r"""Prompts: one a line (.txt), or one JSON object a line (.jsonl).

    {"prompt": "\\"427\\" in red", "negative_prompt": "blurry", "text": "427"}

Of an object, `prompt` and `negative_prompt` are the model's; everything else is metadata for the rewards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

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


class IndexedPrompt(NamedTuple):
    """A validation prompt and its place in the file; its latents are a function of the place."""

    place: int
    prompt: Prompt


class PromptDataModule(LightningDataModule):
    """Prompts for training and for validation. It reads files; the model makes images of them.

    Args:
        train: prompt file that rollouts draw from.
        val: prompt file that validation paints with fixed latents; None validates on nothing.
        val_batch_size: images a forward in validation, a device.

    Raises:
        ConfigurationError: at set-up, before any model is loaded: see `read_prompts`.
    """

    def __init__(self, train: str, val: str | None = None, val_batch_size: int = 64) -> None:
        super().__init__()
        self.train_path = train
        self.val_path = val
        self.val_batch_size = val_batch_size
        self.train_prompts: list[Prompt] = []
        self.val_prompts: list[Prompt] = []

    def setup(self, stage: str) -> None:
        """Reads the files, and lets the model's rewards check each prompt."""
        model = self.trainer.lightning_module if self.trainer else None
        if stage == "fit":
            self.train_prompts = read_prompts(self.train_path)
        if self.val_path is not None:
            self.val_prompts = read_prompts(self.val_path)
        elif stage == "validate":
            raise ConfigurationError("data.val: expected a prompt file to validate on, got none")
        elif self.trainer is not None:
            self.trainer.limit_val_batches = 0  # Lightning's own way to train without validation
        check = getattr(model, "check_prompts", None)
        if check is not None:
            check(self.train_prompts, self.val_prompts)

    def train_dataloader(self) -> Iterable[Any]:
        """The rollouts that the model makes of the training prompts."""
        loader: Iterable[Any] = self.trainer.lightning_module.rollout_loader(self.train_prompts)  # type: ignore[union-attr,operator]
        return loader

    def val_dataloader(self) -> Any:
        """Batches of `IndexedPrompt`s, in the file's order."""
        rows = [IndexedPrompt(place, prompt) for place, prompt in enumerate(self.val_prompts)]
        return DataLoader(rows, batch_size=self.val_batch_size, collate_fn=list)  # type: ignore[arg-type]
