"""RolloutLog: how often the drift is measured, and what it costs."""

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_fdfo import Evaluation, Objective
from lightning_fdfo.callbacks import Curves, RewardHackingMonitor
from lightning_fdfo.callbacks.reward_hacking_monitor import Band
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
