"""ctrl-C and SIGTERM on the toy flow, in this process: where a run stops, what it says, how it goes on."""

import os
import signal
import sys

import pytest
import torch
from lightning.pytorch import Callback

from lightning_fdfo.checkpoints.last_checkpoint import last_file
from lightning_fdfo.guards.stop import StopOnSignal, ends_at_once, resuming_command
from lightning_fdfo.reward.term import RewardTerm
from tests.conftest import brightness

WITH = {"enable_checkpointing": True}


class At(Callback):
    """Sends this process a signal in the third epoch: in its rollout, its first or last batch, or its validation."""

    def __init__(self, moment, number, epoch=2):
        self.moment, self.number, self.epoch = moment, number, epoch
        self.counts = {"reward": 0, "batch": 0, "validation": 0}

    def setup(self, trainer, pl_module, stage):
        self.trainer = trainer

    def reward(self, images, prompts, metadata):
        self.now("reward")
        return brightness(images, prompts, metadata)

    def now(self, moment):
        if self.trainer.sanity_checking or self.trainer.current_epoch != self.epoch:
            return
        self.counts[moment] += not self.trainer.validating or moment == "validation"
        if moment == self.moment and self.counts[moment] == 1:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.now("batch")

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.moment == "last batch" and trainer.is_last_batch and trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.now("validation")


@pytest.fixture
def stopped(toy_module, fit, tmp_path, prompts_file, capsys):
    """Runs six epochs, of which the third is disturbed; its exit code, what it says, and the callback."""

    def run(moment, number, command="go on", **options):
        at = At(moment, number)
        module = toy_module(rewards={"brightness": RewardTerm(at.reward)}, rollout_batch_size=4)
        settings = WITH | {"val": str(prompts_file), "check_val_every_n_epoch": 3} | options
        with pytest.raises(SystemExit) as end:
            fit(module, 6, callbacks=[at, StopOnSignal(command)], **settings)
        return end.value.code, capsys.readouterr().err, at

    return run


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
@pytest.mark.parametrize(
    ("moment", "epochs", "counts"),
    [
        ("reward", 2, {"reward": 1, "batch": 0}),  # of four chunks of the rollout
        ("batch", 2, {"reward": 4, "batch": 1}),
        ("last batch", 3, {"reward": 4, "batch": 4}),  # the epoch is ended and saved: nothing of it is lost
    ],
)
def test_a_run_stops_after_the_current_batch(stopped, tmp_path, number, code, name, moment, epochs, counts):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    file = last_file(tmp_path)
    options = {"limit_val_batches": 0} if moment == "last batch" else {}
    ended, said, at = stopped(moment, number, **options)
    assert ended == code
    assert f"\nStopped by {name}: {file} holds {epochs} of 6 epochs; resume by go on\n" in said
    assert torch.load(file, weights_only=True)["epoch"] == epochs - 1
    assert {key: at.counts[key] for key in counts} == counts
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_processes_ask_each_other_once_a_chunk_an_update_and_a_batch_of_a_validation(
    toy_module, fit, prompts_file, monkeypatch
):
    asked = []
    ask = StopOnSignal.stop_if_asked
    monkeypatch.setattr(
        StopOnSignal, "stop_if_asked", lambda self, trainer: (asked.append(trainer), ask(self, trainer))
    )
    trainer = fit(toy_module(), 1)
    assert trainer.accumulate_grad_batches == 2
    assert trainer.num_training_batches == 4
    assert len(asked) == 2 + 2  # chunks of the rollout, updates
    asked.clear()
    trainer = fit(toy_module(), 1, val=str(prompts_file), num_sanity_val_steps=0)
    assert len(asked) == 2 + 2 + trainer.num_val_batches[0]


def test_it_stops_in_a_validation(stopped, tmp_path):
    ended, said, _ = stopped("validation", signal.SIGTERM)
    assert ended == 143
    assert "holds 2 of 6 epochs" in said


def test_before_an_epoch_has_ended_there_is_nothing_to_go_on_with(toy_module, fit, tmp_path, capsys):
    class Early(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        fit(toy_module(), 2, callbacks=[Early(), StopOnSignal("this command")], **WITH)
    assert end.value.code == 143
    assert "no epoch has ended, so nothing is saved yet: start again by this command" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_plain_python_is_told_in_python_and_a_stopped_run_goes_on_to_the_bit(
    toy_module, fit, tmp_path, weights, capsys
):
    class Late(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.current_epoch == 3:
                os.kill(os.getpid(), signal.SIGINT)

    whole, resumed = toy_module(), toy_module()
    fit(whole, 5, default_root_dir=tmp_path / "whole", **WITH)
    with pytest.raises(SystemExit) as end:
        fit(toy_module(), 5, callbacks=[Late()], **WITH)
    file = last_file(tmp_path)
    assert end.value.code == 130
    assert f"holds 3 of 5 epochs; resume by trainer.fit(module, data, ckpt_path='{file}')" in capsys.readouterr().err
    fit(resumed, 5, file, **WITH)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_a_second_ctrl_c_ends_at_once(toy_module, fit, monkeypatch, capfd):
    class Twice(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it went on")

    class Ended(BaseException):
        pass

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # another test's: a notebook ends by KeyboardInterrupt
    with pytest.raises(Ended, match="130"):
        fit(toy_module(), 2, callbacks=[Twice()], **WITH)
    assert "after the current batch or update; a second ctrl-C ends it at once" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_of_training_a_signal_ends_at_once_and_in_one_line(toy_module, fit, capfd, number, code):
    class Loading(Callback):
        def on_fit_start(self, trainer, pl_module):
            os.kill(os.getpid(), number)

    trainer = fit(toy_module(), 0)
    with pytest.raises(SystemExit) as end, ends_at_once(trainer):
        fit(toy_module(), 1, callbacks=[Loading()], **WITH)
    assert end.value.code == code
    assert "ended outside of training; the same command does it again" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["fit", "--config", "a.yaml"], "lightning-fdfo fit --config a.yaml --ckpt_path last"),
        (["fit", "--ckpt_path", "last", "--x=1"], "lightning-fdfo fit --x=1 --ckpt_path last"),
        (["fit", "--ckpt_path=c/epoch=9.ckpt", "--x", "y z"], "lightning-fdfo fit --x 'y z' --ckpt_path last"),
    ],
)
def test_the_command_that_goes_on(words, command):
    assert resuming_command("/venv/bin/lightning-fdfo", words) == command
    module = resuming_command("/lib/lightning_fdfo/__main__.py", words)
    assert module == command.replace("lightning-fdfo", "python -m lightning_fdfo")
