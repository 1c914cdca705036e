"""Means over an epoch: what is logged of several batches, and how often Lightning is asked to."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_fdfo.training.epoch_log import EpochLog


class Losses(Callback):
    """Each batch's loss, and how often the module calls `log_dict` in training."""

    def __init__(self, module, monkeypatch):
        self.losses, self.calls, original = [], 0, module.log_dict

        def count(*arguments, **options):
            self.calls += module.trainer.training
            return original(*arguments, **options)

        monkeypatch.setattr(module, "log_dict", count)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


def rows(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    return [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]


def test_an_epochs_mean_is_that_of_its_batches_and_is_logged_once(toy_module, fit, tmp_path, monkeypatch):
    module = toy_module()
    seen = Losses(module, monkeypatch)
    trainer = fit(module, 2, logger=CSVLogger(tmp_path, name="", version=""), callbacks=[seen])
    per_epoch = len(seen.losses) // 2
    assert per_epoch > 1
    assert seen.calls == 2
    for epoch, row in enumerate(rows(tmp_path)):
        own = seen.losses[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert float(row["train/loss"]) == pytest.approx(sum(own) / len(own), rel=1e-5)
        assert "train/drift" in row
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(float(row["train/loss"]), rel=1e-6)


def test_what_a_fit_has_left_of_an_epoch_is_not_in_the_next_ones_mean(toy_module, fit, tmp_path, monkeypatch):
    class Ends(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("as a full disk does")

    module = toy_module()
    with pytest.raises(RuntimeError, match="as a full disk does"):
        fit(module, 1, callbacks=[Ends()])
    assert module.epoch_log._sums
    seen = Losses(module, monkeypatch)
    fit(module, 1, logger=CSVLogger(tmp_path, name="", version=""), callbacks=[seen])
    (row,) = rows(tmp_path)
    assert float(row["train/loss"]) == pytest.approx(sum(seen.losses) / len(seen.losses), rel=1e-5)


def test_counts_weigh():
    log = EpochLog()

    class Module:
        trainer = type("Trainer", (), {"barebones": False, "training": True})()

    log.add(Module(), {"a": torch.tensor(1.0), "b": 2.0}, 1)
    log.add(Module(), {"a": torch.tensor(4.0)}, 3)
    assert {name: (total / count).item() for name, (total, count) in log._sums.items()} == {"a": 3.25, "b": 2.0}
