import os
import signal

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fdfo.callbacks import SLURMRequeue
from lightning_fdfo.callbacks.slurm_requeue import is_requeued
from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO

JOB = {"NTASKS": "1", "JOB_ID": "4321", "JOB_NAME": "fdfo", "NODELIST": "localhost"}
RANKS = dict.fromkeys(("NODEID", "LOCALID", "PROCID"), "0")


class Warned(Callback):
    """SLURM's warning, in the middle of the second epoch."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The variables of a job, and an `scontrol` that notes how it is called."""
    program = tmp_path / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called.txt\n[ ! -e {tmp_path}/broken ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in (JOB | RANKS).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return tmp_path / "called.txt"


def run(toy_module, fit, tmp_path, environment, callback):
    saving = ModelCheckpoint(tmp_path / "c", every_n_epochs=1, save_on_train_epoch_end=True, save_last=True)
    callbacks = [callback, Warned(), saving]
    plugins = [environment, SafeCheckpointIO()]
    fit(toy_module(), 2, callbacks=callbacks, enable_checkpointing=True, plugins=plugins, barebones=False)


def test_a_job_is_requeued_once_a_warning_and_nothing_is_written_in_the_middle_of_an_epoch(
    job, toy_module, fit, tmp_path, monkeypatch
):
    handler = signal.getsignal(signal.SIGUSR1)
    run(toy_module, fit, tmp_path, SLURMEnvironment(), SLURMRequeue())
    assert set(job.read_text().split("\n")) == {"requeue 4321", ""}
    assert {path.name for path in tmp_path.rglob("*.ckpt")} == {"epoch=1-step=4.ckpt", "last.ckpt"}
    assert signal.getsignal(signal.SIGUSR1) == handler


def test_of_an_array_the_task_is_requeued(job, toy_module, fit, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    run(toy_module, fit, tmp_path, SLURMEnvironment(), SLURMRequeue())
    assert "requeue 77_3" in job.read_text()


def test_a_job_that_cannot_be_requeued_says_so_and_goes_on(job, toy_module, fit, tmp_path):
    (tmp_path / "broken").touch()
    with pytest.warns(UserWarning, match="could not be requeued.*--ckpt_path last"):
        run(toy_module, fit, tmp_path, SLURMEnvironment(), SLURMRequeue())
    assert (tmp_path / "c/last.ckpt").exists()


def test_who_wants_no_requeue_gets_none(job, toy_module, fit, tmp_path):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        run(toy_module, fit, tmp_path, SLURMEnvironment(auto_requeue=False), SLURMRequeue())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not job.exists()


@pytest.mark.parametrize(("count", "requeued"), [(None, False), ("0", False), ("2", True)])
def test_slurm_says_whether_a_job_was_requeued(monkeypatch, count, requeued):
    if count is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    assert is_requeued() == requeued
