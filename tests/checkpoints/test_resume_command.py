"""The shipped quick start, stopped after an epoch and resumed by the real command with other settings."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from lightning_fdfo.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a copy of a run lies elsewhere

ROOT = Path(__file__).parent.parent.parent
SHORT = [
    "--model.batching.num_pairs=4",
    "--model.batching.num_points_per_pair=2",
    "--model.batching.batch_size=8",
    "--data.val=null",
    "--trainer.enable_progress_bar=false",
]


def command(folder, *options):
    main(
        ["fit", "--config=configs/quickstart.yaml", f"--trainer.default_root_dir={folder}", *SHORT, *options],
    )


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("run") / "quickstart"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["lightning-fdfo"])
        command(folder, "--trainer.max_epochs=1")
    return folder


@pytest.fixture
def run(first_run, tmp_path, monkeypatch):
    """A copy of it, to go on with."""
    shutil.copytree(first_run, tmp_path / "run")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    return tmp_path / "run"


def rates(folder):
    """The learning rates of all epochs, also of those before the resume."""
    rows = [
        row
        for file in sorted(folder.glob("csv/*/metrics.csv"))
        for row in csv.DictReader(file.read_text().splitlines())
    ]
    return [float(row["train/learning_rate"]) for row in rows if row["train/learning_rate"]]


def test_a_learning_rate_on_the_command_line_of_a_resume_counts(run, capfd, caplog):
    caplog.set_level("INFO")
    command(run, "--trainer.max_epochs=2", "--ckpt_path=last", "--model.optimizer.init_args.lr=5e-2")
    assert rates(run) == pytest.approx([1e-3, 5e-2])
    said = [record.getMessage() for record in caplog.records if "resume: " in record.getMessage()]
    assert said == ["resume: model.optimizer: lr is 0.001 in the checkpoint, 0.05 on the command line, which counts"]


def test_a_learning_rate_in_another_file_does_not_count_and_is_named(run, tmp_path, caplog):
    caplog.set_level("INFO")
    overlay = tmp_path / "rate.yaml"
    overlay.write_text("model: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 5.0e-2}}}\n")
    command(run, f"--config={overlay}", "--trainer.max_epochs=2", "--ckpt_path=last", "--model.rewards.OCR=0.5")
    assert rates(run) == pytest.approx([1e-3, 1e-3])
    said = [record.getMessage() for record in caplog.records if "resume: " in record.getMessage()]
    assert "resume: model.rewards.OCR.weight: 1.0 in the checkpoint, 0.5 in the configuration, which counts" in said
    assert any(line.startswith("resume: model.optimizer: lr is 0.001 in the checkpoint, which counts") for line in said)


def test_another_optimiser_is_one_line_before_the_model_is_loaded(run, capfd, monkeypatch):
    monkeypatch.setattr("lightning_fdfo.FDFOModule.configure_model", lambda self: pytest.fail("a model was loaded"))
    other = "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 1.0e-3}}"
    with pytest.raises(SystemExit) as stop:
        command(run, "--trainer.max_epochs=2", "--ckpt_path=last", other)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert len(errors) == 1
    assert (
        "the checkpoint's optimizer is 'torch.optim.adamw.AdamW', the configuration's 'torch.optim.sgd.SGD'"
        in errors[0]
    )
