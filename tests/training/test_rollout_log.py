"""RolloutLog: how often the drift is measured, and what it costs."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_fdfo import Evaluation, Objective
from lightning_fdfo.callbacks import Curves, RewardHackingMonitor
from lightning_fdfo.callbacks.reward_hacking_monitor import Band
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.training.base_weights import BaseWeights
from tests.training.test_epoch_log import rows


@pytest.fixture
def forwards(monkeypatch):
    """One entry a time that the base model takes the LoRA's place."""
    taken, in_place = [], BaseWeights.in_place
    monkeypatch.setattr(BaseWeights, "in_place", lambda self: taken.append(self) or in_place(self))
    return taken


@pytest.mark.parametrize(("every", "measured"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (9, [0])])
def test_the_drift_is_measured_every_so_many_epochs(toy_module, fit, tmp_path, forwards, every, measured):
    drawn, logger = Curves(), CSVLogger(tmp_path, name="", version="")
    fit(toy_module(evaluation=Evaluation(drift_every=every)), 5, callbacks=[drawn], logger=logger)
    assert [epoch for epoch, row in enumerate(rows(tmp_path)) if row["train/drift"]] == measured
    assert [epoch - 1 for epoch, _ in drawn.history["train/drift"]] == measured  # Lightning keeps old values
    assert len(forwards) == len(measured)


def test_a_kl_term_and_the_drift_share_a_forward(toy_module, fit, tmp_path, forwards):
    module, logs = toy_module(objective=Objective(kl_weight=0.1)), [tmp_path / name for name in ("kl", "plain")]
    trainer = fit(module, 1, logger=CSVLogger(logs[0], name="", version=""))
    assert len(forwards) == trainer.num_training_batches > 1
    fit(toy_module(objective=Objective()), 1, logger=CSVLogger(logs[1], name="", version=""))
    assert rows(logs[0])[0]["train/drift"] == rows(logs[1])[0]["train/drift"]


def test_a_band_of_the_drift_is_looked_at_where_it_is_measured(toy_module, fit):
    """Below the first epoch's 0: each measurement is outside, and no other epoch repeats it."""
    monitor = RewardHackingMonitor({"train/drift": Band(value=(None, -1.0))})
    with pytest.warns(UserWarning, match="train/drift"):
        fit(toy_module(evaluation=Evaluation(drift_every=2)), 5, callbacks=[monitor])
    assert [event["epoch"] for event in monitor.events] == [0, 2, 4]


def test_a_run_may_resume_where_the_drift_is_not_measured(toy_module, fit, tmp_path):
    """A new process has no number of an earlier epoch; the first that is measured is the monitor's start."""
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    for epochs, ckpt_path in ((1, None), (3, "last")):
        monitor = RewardHackingMonitor({"train/drift": Band(times=(None, 1.5))})
        monitors = [monitor] if ckpt_path else []
        saved = ModelCheckpoint(tmp_path / "c", every_n_epochs=1, save_on_train_epoch_end=True, save_last=True)
        module = toy_module(evaluation=Evaluation(drift_every=2))
        fit(module, epochs, ckpt_path, callbacks=[saved, *monitors], **options)
    assert monitor.start["train/drift"] > 0
    assert monitor.good == 2


def test_a_band_of_a_drift_that_is_never_measured_is_told(toy_module, fit):
    """Without a LoRA there is none."""
    monitor = RewardHackingMonitor({"train/drift": Band(value=(None, 1.0))})
    with pytest.raises(ConfigurationError, match=r"\['train/drift'\] was not logged in epoch 0"):
        fit(toy_module(lora=None, evaluation=Evaluation(drift_every=2)), 1, callbacks=[monitor])
