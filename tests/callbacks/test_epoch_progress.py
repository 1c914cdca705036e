"""EpochProgress: a line per epoch in a file, bars on a terminal, nothing where it is switched off."""

import io
import re
import sys

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar

from lightning_fdfo.__main__ import main
from lightning_fdfo.callbacks import EpochProgress


class Terminal(io.StringIO):
    """Standard output that is one."""

    def isatty(self):
        return True


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "val.txt").write_text("x\ny\n")
    return {"val": str(tmp_path / "val.txt"), "num_sanity_val_steps": -1, "enable_progress_bar": True}


def test_without_a_terminal_an_epoch_is_a_line(toy_module, fit, prompts, capsys):
    fit(toy_module(), 3, callbacks=[EpochProgress()], check_val_every_n_epoch=2, **prompts)
    out = capsys.readouterr().out
    assert "\r" not in out
    number = r"-?\d+\.?\d*"
    epoch = rf"epoch {{}}/3: mean reward {number}, {number} s, \d\d:\d\d left"
    means = rf"reward {number}, brightness {number}"
    lines = [rf"validation before training: {means}", epoch.format(1), rf"{epoch.format(2)}; validation: {means}"]
    for line, expected in zip(out.splitlines(), [*lines, epoch.format(3)], strict=True):
        assert re.fullmatch(expected, line), line


def test_on_a_terminal_a_bar_counts_epochs_and_validations_are_lines(toy_module, fit, prompts, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    fit(toy_module(), 2, callbacks=[EpochProgress()], **prompts)
    out = sys.stdout.getvalue()
    assert "2/2 [" in out
    assert "mean_reward=" in out
    assert "Training:" in out  # two batches an epoch
    assert "v_num" not in out
    assert "DataLoader 0: 100%" not in out
    lines = re.findall(r"validation (before training|after epoch \d): reward \S+, brightness", out)
    assert lines == ["before training", "after epoch 1", "after epoch 2"]


def test_a_run_that_goes_on_counts_from_where_it_stopped(toy_module, fit, prompts, capsys, tmp_path):
    saving = {"enable_checkpointing": True, **prompts}

    def checkpoints():
        return ModelCheckpoint(tmp_path / "c", every_n_epochs=1, save_on_train_epoch_end=True, save_last=True)

    fit(toy_module(), 2, callbacks=[EpochProgress(), checkpoints()], **saving)
    capsys.readouterr()
    fit(toy_module(), 3, "last", callbacks=[EpochProgress(), checkpoints()], **saving)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["validation before resuming", "epoch 3/3"]


def test_a_stop_leaves_the_line_to_what_is_said_of_it(toy_module, fit, prompts, monkeypatch):
    class Fails(EpochProgress):
        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            raise RuntimeError("stop")

    monkeypatch.setattr(sys, "stdout", Terminal())
    bar = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        fit(toy_module(), 2, callbacks=[bar], **prompts)
    assert sys.stdout.getvalue().endswith("\n")
    assert not bar.train_progress_bar._instances


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], [EpochProgress]), (["--trainer.enable_progress_bar=false"], []), (["rich"], [RichProgressBar])],
)
def test_the_command_adds_it_unless_the_configuration_says_otherwise(options, expected, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, "validate", lambda trainer, *_, **__: seen.append(trainer))
    rich = ["--trainer.callbacks+=lightning.pytorch.callbacks.RichProgressBar"]
    given = [rich[0] if option == "rich" else option for option in options]
    main(["validate", "--config=configs/quickstart.yaml", f"--trainer.default_root_dir={tmp_path}", *given])
    assert [type(one) for one in seen[0].callbacks if isinstance(one, ProgressBar)] == expected
