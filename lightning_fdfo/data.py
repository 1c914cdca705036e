"""PromptDataModule: prompts to train on and to evaluate with, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.prompts import IndexedPrompt, Prompt, read_prompts


@runtime_checkable
class PromptUser(Protocol):
    """A module that makes images of prompts, as `FDFOModule` does."""

    def take_prompts(self, train: Sequence[Prompt], val: Sequence[Prompt], images_per_prompt: int) -> None:
        """Takes a command's prompts before a model is loaded; raises ConfigurationError if they cannot be used."""

    def rollout_loader(self, prompts: Sequence[Prompt]) -> Iterable[Any]:
        """The training loader: batches that are made of the prompts."""


class PromptBatches:
    """A device's prompts, in the file's order, each as often as it has images: a block, as many for each device.

    The last device's are filled up with its last prompt, which counts once: sharded weights want as many forwards on
    each, and Lightning's own sampler would count prompts twice.

    Args:
        prompts: all of them.
        batch_size: images per forward.
        rank: the device's number.
        world_size: of devices.
        repeats: images per prompt.

    Example:
        >>> prompts = [Prompt(text, "", {}, "") for text in "abc"]
        >>> for batch in PromptBatches(prompts, 2, rank=1, world_size=2):
        ...     print([(row.prompt_index, row.counted) for row in batch])
        [(2, True), (2, False)]
    """

    def __init__(
        self, prompts: Sequence[Prompt], batch_size: int, rank: int, world_size: int, repeats: int = 1
    ) -> None:
        count = len(prompts) * repeats
        share = -(-count // world_size)
        self.rows = []
        for number in range(rank * share, (rank + 1) * share):
            index, repeat = divmod(min(number, count - 1), repeats)
            self.rows.append(IndexedPrompt(index, prompts[index], number < count, repeat))
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[IndexedPrompt]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.rows[start : start + self.batch_size]


class PromptDataModule(LightningDataModule):
    """Prompts to train on and to evaluate with. It reads files; the model makes images of them.

    Args:
        train: prompt file that rollouts draw from.
        val: prompt file that validation generates images for, from fixed latents; None validates on nothing.
        val_batch_size: images per forward in validation, test and prediction, per device.
        test: prompt file for `test`; None takes `val`.
        predict: prompt file for `predict`; None takes `val`.
        images_per_prompt: in `test` and `predict`, each from latents of its own; the first is validation's. More only
            add images: those that were there stay.

    Raises:
        ConfigurationError: `images_per_prompt` below 1; at set-up, before any model is loaded: see `read_prompts`.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        val_batch_size: int = 64,
        test: str | None = None,
        predict: str | None = None,
        images_per_prompt: int = 1,
    ) -> None:
        super().__init__()
        if images_per_prompt < 1:
            raise ConfigurationError(f"data.images_per_prompt: expected at least 1, got {images_per_prompt}")
        self.train_path = train
        self.val_path = val
        self.val_batch_size = val_batch_size
        self.test_path = test or val
        self.predict_path = predict or val
        self.images_per_prompt = images_per_prompt
        self.train_prompts: list[Prompt] = []
        self.val_prompts: list[Prompt] = []
        self.evaluation_prompts: list[Prompt] = []
        """Of `test` or `predict`."""

    def setup(self, stage: str) -> None:
        """Reads the files, and lets the model's rewards check each prompt."""
        if stage in ("fit", "validate"):
            self._read_for_fit(stage)
        else:
            path = self.test_path if stage == "test" else self.predict_path
            if path is None:
                option = "data.test" if stage == "test" else "data.predict"
                raise ConfigurationError(f"{option}: expected a prompt file, got none, nor data.val")
            self.evaluation_prompts = read_prompts(path)
        module = self.trainer.lightning_module if self.trainer else None
        if isinstance(module, PromptUser):
            module.take_prompts(
                self.train_prompts, [*self.val_prompts, *self.evaluation_prompts], self.images_per_prompt
            )

    def _read_for_fit(self, stage: str) -> None:
        if stage == "fit":
            self.train_prompts = read_prompts(self.train_path)
        if self.val_path is not None:
            self.val_prompts = read_prompts(self.val_path)
        elif stage == "validate":
            raise ConfigurationError("data.val: expected a prompt file to validate on, got none")
        elif self.trainer is not None:
            self.trainer.limit_val_batches = 0  # Lightning's own way to train without validation

    def train_dataloader(self) -> Iterable[Any]:
        """The rollouts that the model makes of the training prompts."""
        module = self.trainer.lightning_module if self.trainer else None
        if not isinstance(module, PromptUser):
            raise ConfigurationError(f"data.train: expected an FDFOModule to train, got {type(module).__name__}")
        return module.rollout_loader(self.train_prompts)

    def val_dataloader(self) -> Iterable[Any]:
        """Batches of `IndexedPrompt`s, in the file's order; each device has its share."""
        return self._batches(self.val_prompts, 1)

    def test_dataloader(self) -> Iterable[Any]:
        """The same of the test's prompts, each `images_per_prompt` times."""
        return self._batches(self.evaluation_prompts, self.images_per_prompt)

    def predict_dataloader(self) -> Iterable[Any]:
        """The same of the prompts to generate images for."""
        return self._batches(self.evaluation_prompts, self.images_per_prompt)

    def _batches(self, prompts: Sequence[Prompt], repeats: int) -> PromptBatches:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return PromptBatches(prompts, self.val_batch_size, rank, world_size, repeats)
