"""PromptDataModule: prompts for training and for validation, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.prompts import Prompt, read_prompts


class IndexedPrompt(NamedTuple):
    """A validation prompt and its place in the file; its latents are a function of the place."""

    place: int
    prompt: Prompt
    counted: bool = True
    """False for one that only keeps a device busy while the others paint theirs."""


class PromptBatches:
    """A device's validation prompts, in the file's order: a block of them, as many for each device.

    The last device's are filled up with its last prompt, which counts once: sharded weights want as many forwards on
    each, and Lightning's own sampler would count prompts twice.

    Args:
        prompts: all of them.
        batch_size: prompts a forward.
        rank: the device's number.
        world_size: of devices.

    Example:
        >>> prompts = [Prompt(text, "", {}, "") for text in "abc"]
        >>> for batch in PromptBatches(prompts, 2, rank=1, world_size=2):
        ...     print([(row.place, row.counted) for row in batch])
        [(2, True), (2, False)]
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, rank: int, world_size: int) -> None:
        share = -(-len(prompts) // world_size)
        last = len(prompts) - 1
        places = range(rank * share, (rank + 1) * share)
        self.rows = [IndexedPrompt(min(place, last), prompts[min(place, last)], place <= last) for place in places]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[IndexedPrompt]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.rows[start : start + self.batch_size]


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

    def val_dataloader(self) -> Iterable[Any]:
        """Batches of `IndexedPrompt`s, in the file's order; each device has its share."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return PromptBatches(self.val_prompts, self.val_batch_size, rank, world_size)
