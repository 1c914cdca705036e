"""A long run of a tiny setting: what it holds in memory does not grow."""

import gc
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_fdfo.callbacks import EMA, Curves

EPOCHS, SETTLED = 300, 50


def resident():
    """Bytes in memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Weigh(Callback):
    """Resident bytes after some epochs, by their number from 1."""

    def __init__(self):
        self.bytes = {}

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 in (SETTLED, EPOCHS):
            self.bytes[trainer.current_epoch + 1] = resident()


@pytest.fixture
def one_thread():
    """Matrices of a few numbers: more threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory as Linux tells it")
def test_memory_does_not_grow(toy_module, fit, prompts_file, tmp_path):
    """300 epochs with a checkpoint and a validation every tenth, the average, both loggers and the curve."""
    weigh = Weigh()
    callbacks = [
        ModelCheckpoint(tmp_path / "checkpoints", every_n_epochs=10, save_on_train_epoch_end=True, save_last=True),
        EMA(),
        Curves(),
        weigh,
    ]
    fit(
        toy_module(),
        EPOCHS,
        val=str(prompts_file),
        callbacks=callbacks,
        enable_checkpointing=True,
        check_val_every_n_epoch=10,
        num_sanity_val_steps=0,
        logger=[TensorBoardLogger(tmp_path), CSVLogger(tmp_path, flush_logs_every_n_steps=1)],
    )
    settled, end = weigh.bytes[SETTLED], weigh.bytes[EPOCHS]
    print(f"\nresident: {settled / 2**20:.1f} MiB after epoch {SETTLED}, {end / 2**20:.1f} MiB after epoch {EPOCHS}")
    assert end <= 1.02 * settled
