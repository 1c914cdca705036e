"""last.ckpt on the toy flow, in plain Python: written at every epoch's end whatever the trainer's callbacks are."""

import os

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.checkpoints.last_checkpoint import LastCheckpoint, find_last, last_file
from lightning_fdfo.checkpoints.run_owner import MARK
from lightning_fdfo.errors import ConfigurationError

WITH = {"enable_checkpointing": True, "plugins": []}
"""The trainer as a user makes it: Lightning's own writer, and no callback for last.ckpt."""


class Look(Callback):
    """The epoch of last.ckpt, and the logged steps, as the next epoch begins and when training ends."""

    def __init__(self, folder):
        self.file, self.epochs = last_file(folder), []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append(torch.load(self.file, weights_only=True)["epoch"] if self.file.exists() else None)

    def on_train_end(self, trainer, pl_module):
        self.on_train_epoch_start(trainer, pl_module)


def test_it_is_there_after_each_epoch_and_atomic_and_nobody_has_to_ask(toy_module, fit, tmp_path):
    look = Look(tmp_path)
    trainer = fit(toy_module(), 4, callbacks=[look], **WITH)
    assert look.epochs == [None, 0, 1, 2, 3]
    assert type(trainer.strategy.checkpoint_io) is SafeCheckpointIO
    assert isinstance(trainer.callbacks[-1], LastCheckpoint), "it is written after all others"


def test_a_run_goes_on_from_it_to_the_bit(toy_module, fit, tmp_path, weights):
    whole, resumed = toy_module(), toy_module()
    fit(whole, 5, default_root_dir=tmp_path / "whole", **WITH)
    fit(toy_module(), 3, default_root_dir=tmp_path / "run", **WITH)
    trainer = fit(resumed, 5, find_last(tmp_path / "run"), default_root_dir=tmp_path / "run", **WITH)
    assert trainer.global_step == 10
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_an_epoch_that_is_cut_short_is_not_written(toy_module, fit, tmp_path):
    class CutShort(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.current_epoch == 2 and batch_idx == 1

    trainer = fit(toy_module(), 5, callbacks=[CutShort()], **WITH)
    assert trainer.global_step == 5, "two epochs of two updates, and one of the third"
    assert torch.load(last_file(tmp_path), weights_only=True)["epoch"] == 1


def test_another_runs_file_is_not_written_over(toy_module, fit, tmp_path):
    """Also where a run was to go on by Lightning's "last", which finds nothing in a folder of its own.

    A folder of a version that made no mark.
    """
    fit(toy_module(), 2, **WITH)
    content = last_file(tmp_path).read_bytes()
    elsewhere = [ModelCheckpoint(tmp_path / "elsewhere")]
    for ckpt_path, callbacks in ((None, []), ("last", elsewhere)):
        (tmp_path / MARK).unlink(missing_ok=True)
        with (
            pytest.warns(match="no last checkpoint available") if ckpt_path else pytest.MonkeyPatch.context(),
            pytest.raises(ConfigurationError, match="holds a run already"),
        ):
            fit(toy_module(), 4, ckpt_path, callbacks=callbacks, **WITH)
    assert last_file(tmp_path).read_bytes() == content


def test_one_trainer_fits_twice(toy_module, fit, tmp_path):
    module = toy_module()
    trainer = fit(module, 2, **WITH)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=trainer.datamodule)
    assert torch.load(last_file(tmp_path), weights_only=True)["epoch"] == 2
    assert sum(isinstance(callback, LastCheckpoint) for callback in trainer.callbacks) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_top_k": 0, "save_last": True}, "ModelCheckpoint: save_last is not needed: "),
        ({"save_last": True}, "ModelCheckpoint: save_last is not needed: "),
        ({"dirpath": "c", "save_top_k": 0, "save_last": True}, "c/last.ckpt is not written at every epoch's end"),
        ({"dirpath": "c", "every_n_epochs": 2, "save_last": True}, "c/last.ckpt is not written at every epoch's end"),
        ({"dirpath": "c", "save_last": True, "save_on_train_epoch_end": True}, ""),
        ({"save_top_k": 0}, ""),
        ({"dirpath": "c", "save_on_exception": True}, "in the middle of an epoch, from where no run resumes exactly"),
        ({"dirpath": "c", "every_n_train_steps": 3}, "in the middle of an epoch, from where no run resumes exactly"),
    ],
)
def test_lightnings_own_last_cannot_be_in_its_way(toy_module, fit, tmp_path, caplog, options, said):
    """Its file is ours, or another whose promise is checked: the faulty setting of old configurations included."""
    look = Look(tmp_path)
    caplog.set_level("INFO")
    saving = ModelCheckpoint(**(options | {"dirpath": tmp_path / options.get("dirpath", "checkpoints")}))
    fit(toy_module(), 3, callbacks=[look, saving], **WITH)
    assert look.epochs == [None, 0, 1, 2]
    assert said in caplog.text
    assert ("ModelCheckpoint" in caplog.text) == bool(said)


def test_no_checkpoints_are_an_option_and_said(toy_module, fit, tmp_path, caplog):
    caplog.set_level("INFO")
    fit(toy_module(), 1, enable_checkpointing=False)
    assert "Checkpoints are switched off: a run that is stopped or killed is lost." in caplog.text
    assert not last_file(tmp_path).exists()


def test_another_writer_is_left_alone(toy_module, fit, tmp_path):
    class Own(TorchCheckpointIO):
        pass

    trainer = fit(toy_module(), 1, enable_checkpointing=True, plugins=[Own()])
    assert type(trainer.strategy.checkpoint_io) is Own


def test_what_last_means(tmp_path):
    assert find_last(tmp_path) is None
    folder = last_file(tmp_path).parent
    (folder / "best").mkdir(parents=True)
    for epoch in range(9, 80, 10):
        (folder / f"epoch={epoch}.ckpt").touch()
        os.utime(folder / f"epoch={epoch}.ckpt", (epoch, epoch))
    with pytest.raises(ConfigurationError) as error:
        find_last(tmp_path)
    assert f"--ckpt_path last: {folder} holds no last.ckpt, but epoch=79.ckpt, " in str(error.value)
    assert "epoch=39.ckpt and 3 older ones: resume from one by --ckpt_path " in str(error.value)
    assert f"{folder}/epoch=79.ckpt, or start from scratch in another folder" in str(error.value)
    last_file(tmp_path).touch()
    assert find_last(tmp_path) == last_file(tmp_path)


def test_a_resume_says_how_many_epochs_are_done(toy_module, fit, tmp_path, caplog):
    caplog.set_level("INFO")
    fit(toy_module(), 2, **WITH)
    file = last_file(tmp_path)
    fit(toy_module(), 3, ckpt_path=str(file), **WITH)
    assert f"Resuming from {file}: 2 of 3 epochs are done" in caplog.text
