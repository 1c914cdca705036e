"""The rollout's progress bar, in the library that the trainer's bar uses: live bars of two libraries would clash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from tqdm import tqdm

NAME = "Rollout"


def rollout_bar(trainer: Trainer, chunks: Sequence[range]) -> Iterator[range]:
    """Yields the chunks of a rollout, with a bar if the trainer has one.

    Args:
        trainer: with a bar of tqdm, of rich, or of another kind or none, beside which nothing is shown.
        chunks: of pairs.
    """
    bar = trainer.progress_bar_callback
    if not trainer.is_global_zero or not getattr(bar, "is_enabled", False):
        yield from chunks
    elif isinstance(bar, RichProgressBar) and bar.progress is not None:
        shown = bar.progress
        # One task for all epochs, hidden in between: to remove it would shift those that Lightning finds by number.
        known = [task.id for task in shown.tasks if task.description == NAME]
        task = known[0] if known else shown.add_task(NAME, total=len(chunks))
        shown.reset(task, total=len(chunks), visible=True)
        try:
            for chunk in chunks:
                yield chunk
                shown.advance(task)
        finally:
            shown.update(task, visible=False)
    elif isinstance(bar, TQDMProgressBar):
        yield from tqdm(chunks, desc=NAME, unit="chunk", leave=False, dynamic_ncols=True)
    else:
        yield from chunks
