"""A short quick start by the real command, from a folder of the user's own, with its output in a file."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MASK = 0o027
FEW = [
    "--model.batching.num_pairs=4",
    "--model.batching.batch_size=16",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and what was printed; the prompts are the shipped ones, beside the configuration, cut short."""
    there, here = tmp_path_factory.mktemp("there"), tmp_path_factory.mktemp("here")
    (there / "configs/prompts").mkdir(parents=True)
    (there / "configs/quickstart.yaml").write_text((ROOT / "configs/quickstart.yaml").read_text())
    for name in ("digits_train.txt", "digits_heldout.txt"):
        lines = (ROOT / "configs/prompts" / name).read_text().splitlines()[:6]
        (there / "configs/prompts" / name).write_text("\n".join(lines))
    line = [sys.executable, "-m", "lightning_fdfo", "fit", "--config", str(there / "configs/quickstart.yaml"), *FEW]
    with (here / "log.txt").open("w") as log:
        subprocess.run(
            line, cwd=here, stdout=log, stderr=subprocess.STDOUT, check=True, timeout=300, umask=MASK,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/rewards"},
        )  # fmt: skip
    return here / "runs/quickstart", (here / "log.txt").read_text()


def test_each_line_says_one_thing_that_matters(finished):
    _, log = finished
    assert "\r" not in log
    means = r"reward \S+, OCR \S+, exact_match \S+"
    expected = [
        r"Rewards: 1 OCR; in validation also exact_match",
        r"Plan: 4 pairs per epoch .*",
        r"Folder: runs/quickstart",
        r"Model: tiny-digits \(StableDiffusion3\)",
        r"LoRA of rank 32 on 31 layers",
        rf"validation before training: {means}",
        r"epoch 1/2: mean reward \S+, \S+ s, \d\d:\d\d left",
        rf"epoch 2/2: mean reward \S+, \S+ s, 00:00 left; validation: {means}",
        r" +Fixed validation prompts +",
        *[r"[┏┃┡│└].*"] * 7,
        r"Done: pictures, curves and checkpoints are in runs/quickstart",
    ]
    for line, pattern in zip(log.splitlines(), expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_every_file_and_folder_follows_the_umask(finished):
    folder, _ = finished
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert {"pytorch_lora_weights.safetensors", "last.ckpt", "after.png", "config.yaml"} <= {p.name for p in modes}
    wrong = {
        str(path): oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~MASK
    }
    assert not wrong
