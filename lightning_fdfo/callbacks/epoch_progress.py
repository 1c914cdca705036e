"""EpochProgress: a bar over epochs on a terminal, or a line for each epoch in a file."""

from __future__ import annotations

import builtins
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import TrainerFn


class EpochProgress(TQDMProgressBar):
    """Shows how far a fit is: its epochs, the mean reward, and the time that is left.

    On a terminal a bar counts epochs; a second one, below it, counts what an epoch is made of: chunks of the rollout,
    batches, validation. Where standard output is no terminal (a pipe, a log file, CI, a notebook), each epoch is a
    line, and there are no carriage returns. Validation's means are printed either way.

        epoch  20/100: mean reward -0.7312, 2.4 s, 03:12 left; validation: reward -0.81, exact_match 0.72

    The time left is the mean time of an epoch so far, validation included, for each epoch to come.

    `lightning-fdfo` adds it unless the configuration has a progress bar, or `trainer.enable_progress_bar: false`. In
    Python it is one of the trainer's callbacks.

    Example:
        >>> bar = EpochProgress()
        >>> Trainer(callbacks=[bar], accelerator="cpu", logger=False).progress_bar_callback is bar
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._validation = ""
        self._first_epoch = 0
        self._train_started = self._epoch_started = 0.0
        self._batches: Any = None

    @property
    def is_enabled(self) -> bool:
        """Whether there are bars: on a terminal, on the first process."""
        return super().is_enabled and sys.stdout.isatty()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What was logged for the progress bar; the version of a logger is no number of the run."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def print(self, *args: Any, sep: str = " ", **options: Any) -> None:
        """Prints above the bars; without any, as Python does."""
        if self.is_enabled:
            Tqdm.write(sep.join(map(str, args)), **options)
        else:
            builtins.print(*args, sep=sep, flush=True, **options)

    def _say(self, line: str) -> None:
        if super().is_enabled:  # on the first process
            self.print(line)

    # Training

    def init_train_tqdm(self) -> Tqdm:
        """The bar over epochs; a resumed run begins where it stopped."""
        total = self.trainer.max_epochs
        return Tqdm(
            desc="Epochs", unit="epoch", total=total if total and total > 0 else None, initial=self._first_epoch,
            disable=self.is_disabled, leave=True, dynamic_ncols=True, file=sys.stdout, smoothing=0,
        )  # fmt: skip

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar over epochs."""
        self._first_epoch, self._train_started = trainer.current_epoch, time.perf_counter()
        super().on_train_start()

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._epoch_started, self._validation = time.perf_counter(), ""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Opens a bar over the epoch's batches, once its rollout is over."""
        if batch_idx == 0 and trainer.num_training_batches > 1:
            self._batches = Tqdm(
                desc="Training", unit="batch", total=trainer.num_training_batches, position=1,
                disable=self.is_disabled, leave=False, dynamic_ncols=True, file=sys.stdout,
            )  # fmt: skip

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Counts a batch; the bar is gone after the last one."""
        if self._batches is not None:
            self._batches.update()
            if trainer.is_last_batch:
                self._close_batches()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts an epoch, or prints its line."""
        numbers = self.get_metrics(trainer, pl_module)
        if self.is_enabled:
            self.train_progress_bar.set_postfix(numbers, refresh=False)
            self.train_progress_bar.update()
            self.train_progress_bar.refresh()
        else:
            self._say(self._line(trainer.current_epoch + 1, trainer.max_epochs, numbers))

    def _line(self, epoch: int, epochs: int | None, numbers: Mapping[str, Any]) -> str:
        now = time.perf_counter()
        parts = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items()]
        parts.append(f"{now - self._epoch_started:.1f} s")
        counted = f"epoch {epoch}"
        if epochs and epochs > 0:
            counted = f"epoch {epoch:{len(str(epochs))}}/{epochs}"
            left = (now - self._train_started) / (epoch - self._first_epoch) * (epochs - epoch)
            parts.append(f"{Tqdm.format_interval(left)} left")
        return f"{counted}: {', '.join(parts)}{self._validation and f'; validation: {self._validation}'}"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bars: what is printed of an error begins a line of its own."""
        self._close_batches()
        for bar in (self._train_progress_bar, self._val_progress_bar):
            if bar is not None:
                bar.close()

    def _close_batches(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    # Validation, test, prediction

    @property
    def sanity_check_description(self) -> str:
        """What Lightning calls a sanity check is the base model's validation."""
        return "Validation before training"

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        super().on_validation_batch_start(trainer, *args, **options)
        name = self.sanity_check_description if trainer.sanity_checking else self.validation_description
        self.val_progress_bar.set_description(name)

    def on_test_batch_start(self, *args: Any, **options: Any) -> None:
        super().on_test_batch_start(*args, **options)
        self.test_progress_bar.set_description(self.test_description)

    def on_predict_batch_start(self, *args: Any, **options: Any) -> None:
        super().on_predict_batch_start(*args, **options)
        self.predict_progress_bar.set_description(self.predict_description)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the means, or keeps them for the epoch's line."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        means = trainer.callback_metrics
        numbers = ", ".join(f"{name[4:]} {means[name].item():.4g}" for name in means if name.startswith("val/"))
        if trainer.sanity_checking:
            self._say(f"validation before {'resuming' if trainer.global_step else 'training'}: {numbers}")
        elif self.is_enabled:
            self._say(f"validation after epoch {trainer.current_epoch + 1}: {numbers}")
        else:
            self._validation = numbers
