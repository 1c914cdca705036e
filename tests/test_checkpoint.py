import os
import pickle
from pathlib import Path

import pytest
import torch

from lightning_fdfo.checkpoint import AtomicCheckpointIO


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"epoch": 1}, path)

    def torn(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", torn)
    with pytest.raises(OSError, match="no space left"):
        io.save_checkpoint({"epoch": 2}, path)
    assert io.load_checkpoint(path) == {"epoch": 1}


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_does_not_run(tmp_path):
    target = tmp_path / "exploded"
    torch.save({"state_dict": Bomb(target)}, tmp_path / "bomb.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bomb.ckpt", weights_only=False)
    assert not target.exists()
