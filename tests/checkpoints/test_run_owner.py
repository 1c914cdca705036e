"""One run a folder, one process at a time: by the command on the shipped configuration, and in plain Python."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fdfo import PromptDataModule
from lightning_fdfo.__main__ import main
from lightning_fdfo.callbacks import Curves
from lightning_fdfo.checkpoints.run_owner import LOCK, MARK, RunOwner, trial_folder
from lightning_fdfo.errors import ConfigurationError
from tests import processes

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.rewards={JPEGSize: 1.0}",
    "--model.evaluation.metrics=null",
    "--model.sampling.num_steps=2",
    "--model.batching.num_pairs=4",
    "--model.batching.num_points_per_pair=null",
    "--model.batching.batch_size=8",
    "--trainer.check_val_every_n_epoch=1000",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
]


def fit_line(folder, *more):
    return ["fit", "--config", "configs/quickstart.yaml", f"--trainer.default_root_dir={folder}", *SMALL, *more]


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)  # which names who asked last
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the quick start that has ended."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        main(fit_line(folder, "--trainer.max_epochs=1"))
    return folder


def test_a_run_marks_its_folder(finished):
    assert json.loads((finished / MARK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("more", [[], ["--seed_everything=1"], ["--trainer.callbacks=null", "--trainer.logger=false"]])
def test_a_finished_run_is_not_overwritten(finished, capsys, monkeypatch, more):
    monkeypatch.chdir(ROOT)
    before = contents(finished)
    with pytest.raises(SystemExit) as stopped:
        main(fit_line(finished, *more))
    assert stopped.value.code == 2
    assert "holds a run already: resume it by --ckpt_path last" in capsys.readouterr().err
    assert contents(finished) == before


def test_fast_dev_run_leaves_a_finished_run_as_it_is(finished, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = contents(finished)
    main(fit_line(finished, "--trainer.fast_dev_run=true"))
    assert contents(finished) == before
    assert (trial_folder() / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert f"{finished} is left as it is; this trial writes to {trial_folder()}" in capfd.readouterr().err


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = processes.start(fit_line(tmp_path, "--trainer.max_epochs=1000"), (os.devnull, os.devnull))
    try:
        deadline = time.monotonic() + 180
        while not (tmp_path / MARK).exists():
            assert first.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for more in ([], ["--ckpt_path=last"]):
            with pytest.raises(SystemExit) as stopped:
                main(fit_line(tmp_path, "--seed_everything=1", *more))
            assert stopped.value.code == 2
            assert f"process {first.pid} on " in capsys.readouterr().err
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    assert RunOwner().claim(tmp_path)  # the lock went with the process


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(fit_line(tmp_path / "file" / "run"))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"error: {tmp_path}/file/run cannot be written: Not a directory; choose another folder")


# In plain Python


def test_another_trainer_is_refused_and_the_same_one_goes_on(fit, toy_module, tmp_path):
    keeping = {"default_root_dir": tmp_path / "run", "enable_checkpointing": True}
    trainer = fit(toy_module(), 1, callbacks=[ModelCheckpoint(tmp_path / "run", filename="{epoch}")], **keeping)
    with pytest.raises(ConfigurationError, match="holds a run already"):
        fit(toy_module(), 1, callbacks=[ModelCheckpoint(tmp_path / "run")], **keeping)
    saving = ModelCheckpoint(tmp_path / "run")
    fit(toy_module(), 2, ckpt_path=str(tmp_path / "run/epoch=0.ckpt"), callbacks=[saving], **keeping)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, PromptDataModule(str(tmp_path / "prompts.txt")))
    assert trainer.current_epoch == 2
    assert sum(isinstance(callback, RunOwner) for callback in trainer.callbacks) == 1


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_of_another_run_does_not_open_a_folder(fit, toy_module, tmp_path):
    for name in ("a", "b"):
        fit(toy_module(), 1, default_root_dir=tmp_path / name, enable_checkpointing=True)
    before = contents(tmp_path / "b")
    with pytest.raises(ConfigurationError, match="b holds a run already"):
        fit(toy_module(), 2, str(tmp_path / "a/checkpoints/last.ckpt"), default_root_dir=tmp_path / "b",
            enable_checkpointing=True)  # fmt: skip
    assert contents(tmp_path / "b") == before
    fit(toy_module(), 2, str(tmp_path / "a/checkpoints/last.ckpt"), default_root_dir=tmp_path / "c",
        enable_checkpointing=True)  # fmt: skip
    assert (tmp_path / "c/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("left", ["checkpoints/epoch=9.ckpt", "lora/pytorch_lora_weights.safetensors"])
def test_what_a_run_has_left_without_a_mark_is_not_written_over(tmp_path, left):
    (tmp_path / left).parent.mkdir()
    (tmp_path / left).write_text("")
    owner = RunOwner()
    owner.claim(tmp_path)
    with pytest.raises(ConfigurationError, match="holds a run already"):
        owner.check_new(tmp_path, None)
    owner.claim(tmp_path)
    owner.check_new(tmp_path, tmp_path / "checkpoints/epoch=9.ckpt")
    owner.release()


def test_the_first_process_is_named_before_it_has_begun(tmp_path):
    owner = RunOwner()
    owner.claim(tmp_path)
    with pytest.raises(ConfigurationError, match=f"process {os.getpid()} on .* trains into it"):
        RunOwner().claim(tmp_path)
    owner.release()


def test_a_callback_of_ours_claims_the_folder_too(fit, toy_module, tmp_path):
    fit(toy_module(), 1, callbacks=[Curves()], default_root_dir=tmp_path / "run")
    with pytest.raises(ConfigurationError, match="holds a run already"):
        fit(toy_module(), 1, callbacks=[Curves()], default_root_dir=tmp_path / "run")


def test_a_fit_that_writes_nothing_claims_nothing(fit, toy_module, tmp_path):
    for _ in range(2):
        fit(toy_module(), 1, default_root_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [tmp_path / f".a.png.partial-{dead.pid}", tmp_path / "checkpoints" / f".last.ckpt.partial-{dead.pid}"]
    written = tmp_path / f".report.html.partial-{os.getppid()}"  # by a process that is alive
    written.write_text("half")
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    owner = RunOwner()
    owner.claim(tmp_path)
    assert not any(path.exists() for path in left)
    assert written.exists()
    owner.release()
    assert (tmp_path / LOCK).exists()
