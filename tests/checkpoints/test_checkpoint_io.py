"""Checkpoints on disk: whole or not there, read without running code; what is wrong with one is told."""

import errno
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.training.trained_state import check_settings, check_weights

IO = SafeCheckpointIO()
WEIGHTS = torch.arange(100_000.0)


def saved(epoch):
    return {"epoch": epoch, "state_dict": {"weight": WEIGHTS}, "pytorch-lightning_version": "2.6.0"}


def partial(name):
    return f".{name}.partial-{os.getpid()}"


@pytest.fixture
def path(tmp_path):
    """An earlier checkpoint that is to be replaced."""
    IO.save_checkpoint(saved(1), tmp_path / "c" / "last.ckpt")
    return tmp_path / "c" / "last.ckpt"


# Writing


def fails(*arguments, code=errno.ENOSPC):
    raise OSError(code, os.strerror(code))


def torn(checkpoint, file):
    """As torch says it where its own writer opened the file."""
    file.write(b"some bytes")
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nframe #0")


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("target", "name", "action", "reason"),
    [
        (os, "fsync", fails, FULL),
        (Path, "replace", fails, FULL),
        (Path, "open", lambda *_: fails(code=errno.EROFS), "Read-only file system"),
        (torch, "save", torn, "unexpected pos 704 vs 598"),
    ],
)
def test_a_write_that_fails_tells_what_it_needs_and_leaves_the_old_file(
    path, monkeypatch, target, name, action, reason
):
    monkeypatch.setattr(target, name, action)
    with pytest.raises(ConfigurationError, match=reason) as error:
        IO.save_checkpoint(saved(2), path)
    monkeypatch.undo()
    assert f"checkpoint {path} cannot be written: " in str(error.value)
    assert "it needs about 390.6 KiB, and " in str(error.value)
    assert " are free there. Earlier checkpoints are complete" in str(error.value)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert IO.load_checkpoint(path)["epoch"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_disk_that_is_really_full(path, size):
    (path.parent / partial("last.ckpt")).symlink_to("/dev/full")
    with pytest.raises(ConfigurationError, match=FULL):
        IO.save_checkpoint({"state_dict": {"weight": torch.zeros(size)}}, path)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert IO.load_checkpoint(path)["epoch"] == 1


def test_what_is_no_fault_of_the_disk_is_not_blamed_on_it(path, monkeypatch):
    def unlucky(*arguments):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", unlucky)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        IO.save_checkpoint(saved(2), path)
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_file_and_folder_are_synced_around_the_rename(path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("rename"), replace(self, to)))
    IO.save_checkpoint(saved(2), path)
    assert events == [str(path.with_name(partial("last.ckpt"))), "rename", str(path.parent)]


def test_what_a_killed_process_of_the_same_number_left_is_overwritten(path):
    path.with_name(partial("last.ckpt")).write_bytes(b"x" * 10_000_000)
    IO.save_checkpoint(saved(2), path)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert IO.load_checkpoint(path)["epoch"] == 2


KILLED = """
import os, sys, torch
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_fdfo import Batching, FDFOModule, LoRA, Objective, PromptDataModule, Sampling
from lightning_fdfo.checkpoints import checkpoint_io as checkpoint
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.checkpoints.last_checkpoint import find_last, last_file
from lightning.pytorch import Trainer
from tests.conftest import ToyFlow, brightness

torch.set_num_threads(1)
folder = Path(sys.argv[1])
(folder / "prompts.txt").write_text("a cat\\nthe dog\\n")

def fit(run, epochs, ckpt_path=None):
    module = FDFOModule(
        flow=ToyFlow(), rewards={"brightness": RewardTerm(brightness)},
        batching=Batching(num_pairs=4, updates_per_epoch=2, batch_size=8, rollout_batch_size=4),
        sampling=Sampling(num_steps=4, height=2, width=2, churn=0.1), lora=LoRA(rank=2, alpha=4),
        objective=Objective(normalization="root_mean_square"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    saving = ModelCheckpoint(folder / run / "checkpoints", filename="{epoch}", save_on_train_epoch_end=True)
    trainer = Trainer(
        max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=folder / run, callbacks=[saving],
    )
    trainer.fit(module, PromptDataModule(str(folder / "prompts.txt")), ckpt_path=ckpt_path and find_last(folder / run))

def die_at(stage, name):
    \"\"\"Ends the process, as kill -9 would, in the second write of a file.\"\"\"
    seen, save, replace = [], torch.save, Path.replace

    def dying_save(value, file):
        seen.append(Path(file.name).name)
        partial = f".{name}.partial-{os.getpid()}"
        here = seen.count(partial) == (1 if "=" in name else 2) and seen[-1] == partial
        if here and stage == "before":
            os._exit(9)
        save(value, file)
        if here and stage == "midst":
            file.flush(); os.truncate(file.name, file.tell() // 2)
            os._exit(9)
        dying_save.here = here

    def dying_replace(self, target):
        if dying_save.here and stage == "written":
            os._exit(9)
        replace(self, target)
        if dying_save.here and stage == "renamed":
            os._exit(9)

    dying_save.here = False
    torch.save, Path.replace = dying_save, dying_replace

def apart(work, *arguments):
    child = os.fork()
    if not child:
        try:
            work(*arguments)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def killed(run, stage, name):
    die_at(stage, name)
    fit(run, 3)

assert apart(fit, "whole", 4) == 0
whole = torch.load(last_file(folder / "whole"))["state_dict"]
for name in ("epoch=1.ckpt", "last.ckpt"):
    for stage in ("before", "midst", "written", "renamed"):
        run = f"{stage}-{name}"
        assert apart(killed, run, stage, name) == 9, run
        last = checkpoint.SafeCheckpointIO().load_checkpoint(last_file(folder / run))
        partial = list((folder / run).rglob(".*.partial-*"))
        assert len(partial) == (stage != "renamed"), (run, partial)
        assert apart(fit, run, 4, "last") == 0, run
        resumed = torch.load(last_file(folder / run))["state_dict"]
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), run
        assert not list((folder / run).rglob(".*.partial-*")), run
        print(run, last["epoch"])
"""


def test_last_is_whole_wherever_a_run_is_killed(tmp_path):
    """In each step of writing a kept file, or last.ckpt; then the run goes on as if nothing had been. Plain Python."""
    line = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    epochs = dict(row.rsplit(" ", 1) for row in result.stdout.splitlines() if ".ckpt " in row)
    assert epochs == {
        f"{stage}-{name}": "1" if (stage, name) == ("renamed", "last.ckpt") else "0"
        for name in ("epoch=1.ckpt", "last.ckpt")
        for stage in ("before", "midst", "written", "renamed")
    }


# Reading


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damaged(path):
    data = path.read_bytes()
    place = data.index(WEIGHTS[5000:5010].numpy().tobytes())
    return data[:place] + b"\0\1" + data[place + 2 :]


def compressed(path):
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(f"{path}.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    return Path(f"{path}.zip").read_bytes()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda path: b"", r"it is cut short, or no checkpoint \(it has 0 B\)"),
        (lambda path: b"no checkpoint at all", "it is cut short, or no checkpoint"),
        (lambda path: path.read_bytes()[:-1], "it is cut short, or no checkpoint"),
        (lambda path: path.read_bytes()[:100_000], r"it is cut short, or no checkpoint \(it has 97.7 KiB\)"),
        (damaged, r"it is damaged: \S+/data/0 has another checksum"),
        (compressed, "it is no checkpoint"),
    ],
)
def test_a_broken_file_is_named_with_a_cure(path, broken, message):
    other = path.with_name("epoch=0.ckpt")
    path.write_bytes(broken(path))
    with pytest.raises(ConfigurationError, match=message) as error:
        IO.load_checkpoint(path)
    assert f"checkpoint {path} cannot be loaded: " in str(error.value)
    assert str(error.value).endswith("; there is none beside it")
    IO.save_checkpoint(saved(0), other)
    with pytest.raises(ConfigurationError, match=r"another one in its folder by --ckpt_path FILE: epoch=0\.ckpt$"):
        IO.load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "lacks"),
    [
        ([1], "state_dict"),
        (torch.ones(2), "state_dict"),
        ({"weights": 1}, "state_dict"),
        ({"state_dict": [1]}, "state_dict"),
        ({"state_dict": {}}, "pytorch-lightning_version"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, content, lacks):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match=f"it is no Lightning checkpoint: it has no {lacks}"):
        IO.load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(("name", "message"), [("none.ckpt", "it is not there"), (".", "it is no file")])
def test_a_missing_file_is_told(tmp_path, name, message):
    with pytest.raises(ConfigurationError, match=message):
        IO.load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda bomb, path: torch.save({"state_dict": bomb}, path), r"it holds (posix|nt)\.mkdir, which only code"),
        (
            lambda bomb, path: torch.save({"state_dict": {}, "callbacks": {"x": pytest.raises}}, path),
            r"pytest\.\S*raises",
        ),
        (lambda bomb, path: torch.save(bomb, path, _use_new_zipfile_serialization=False), "it is cut short, or no"),
        (lambda bomb, path: path.write_bytes(pickle.dumps(bomb)), "it is cut short, or no checkpoint"),
    ],
)
@pytest.mark.parametrize("weights_only", [None, False, True])
def test_pickled_code_does_not_run(tmp_path, write, message, weights_only):
    target = tmp_path / "exploded"
    write(Bomb(target), tmp_path / "bomb.ckpt")
    with pytest.raises(ConfigurationError, match=message):
        IO.load_checkpoint(tmp_path / "bomb.ckpt", weights_only=weights_only)
    assert not target.exists()


# What does not fit


def test_all_settings_that_differ_are_told():
    with pytest.raises(
        ConfigurationError,
        match=r"written with seed=1, the configuration says 0; with lora\.rank=2, the configuration says 4: use",
    ):
        check_settings({"seed": 1, "lora.rank": 2, "lora.alpha": 4.0}, {"seed": 0, "lora.rank": 4, "lora.alpha": 4.0})


@pytest.mark.parametrize("saved", [{}, None, [], "seed"])
def test_a_checkpoint_without_settings_is_another_ones(saved):
    with pytest.raises(ConfigurationError, match="written with seed=None, the configuration says 0"):
        check_settings(saved, {"seed": 0})


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        ({"A": [2, 3]}, {"A": [4, 3]}, r"1 weights differ .* first A: it has \[2, 3\], expected \[4, 3\]"),
        ({"A": [2], "B": [3]}, {"A": [2]}, r"first B: it has \[3\], expected nothing"),
        ({}, {"A": [2], "B": [3]}, r"2 weights differ .* first A: it has nothing, expected \[2\]"),
    ],
)
def test_weights_that_differ_are_told(saved, own, message):
    with pytest.raises(ConfigurationError, match=message):
        check_weights(saved, own)
