"""A reward's failure on the command line, of a module in the current folder: the sentence, and its author's frames."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_fdfo.__main__ import main

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.evaluation.metrics=null",
    "--model.sampling.num_steps=2",
    "--model.batching.num_pairs=4",
    "--model.batching.num_points_per_pair=null",
    "--model.batching.batch_size=8",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_epochs=1",
    f"--data.train={ROOT}/configs/prompts/digits_train.txt",
    f"--data.val={ROOT}/configs/prompts/digits_heldout.txt",
]
PLUGIN = """
import json

import torch

from lightning_fdfo import Reward
from bad import helper


class Shape2(Reward):
    def __init__(self, gain=1.0):
        self.gain = gain

    def __call__(self, images, prompts, metadata):
        return helper.deeper(images)


def leaves(images, prompts, metadata):
    raise SystemExit(0)


def one_for_all(images, prompts, metadata):
    return images.mean()


def parses(images, prompts, metadata):
    return json.loads("{")


def multiplies(images, prompts, metadata):
    return torch.nn.functional.linear(images, torch.zeros(2, 5))
"""
HELPER = """
def deeper(images):
    raise ValueError("two\\nlines")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder of a user who runs the installed command, with a package of rewards in it."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/__init__.py").touch()
    (tmp_path / "bad/r.py").write_text(PLUGIN)
    (tmp_path / "bad/helper.py").write_text(HELPER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "bad"]:
        del sys.modules[name]


def fit(monkeypatch, reward, *more):
    """Exit code of the shipped quick start with another reward."""
    config = f"--config={ROOT}/configs/quickstart.yaml"
    monkeypatch.setattr(sys, "argv", ["lightning-fdfo"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", config, "--trainer.default_root_dir=run", f"--model.rewards={reward}", *SMALL, *more])
    return stop.value.code


def said(capsys):
    """The sentence, and the lines after it."""
    lines = capsys.readouterr().err.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("error: "))
    return lines[start], lines[start + 1 :]


def test_the_sentence_stands_first_and_only_the_authors_frames_below(folder, monkeypatch, capsys):
    reward = "{shape: {reward: {class_path: bad.r.Shape2, init_args: {gain: 2.0}}, weight: 1}}"
    assert fit(monkeypatch, reward) == 3
    sentence, frames = said(capsys)
    assert re.search(r"pairs? .* of epoch 0: .*reward 'shape' \(Shape2 of the module bad\.r\): failed on", sentence)
    assert [frame.strip() for frame in frames if frame.startswith("  File ")] == [
        f'File "{folder}/bad/r.py", line 15, in __call__',
        f'File "{folder}/bad/helper.py", line 3, in deeper',
    ]
    assert frames[-2:] == ["ValueError: two", "lines"]
    command = re.search(r"`lightning-fdfo (rewards check [^`]*)`", sentence)[1]
    assert shlex.split(command) == ["rewards", "check", "bad.r.Shape2", "--init_args", "{gain: 2.0}"]
    with pytest.raises(SystemExit) as stop:  # the command that it names works
        main(shlex.split(command))
    assert stop.value.code == 1
    assert "FAILED gives one finite number an image, or a pair: it raised ValueError" in capsys.readouterr().out


def test_a_reward_that_exits_ends_no_run_silently(folder, monkeypatch, capsys):
    assert fit(monkeypatch, "{bad.r.leaves: 1.0}") == 3
    sentence, frames = said(capsys)
    assert "reward 'bad.r.leaves' (leaves of the module bad.r): failed on images on cpu: SystemExit(0)" in sentence
    assert frames[-1] == "SystemExit: 0"


@pytest.mark.parametrize(
    ("reward", "message", "frames"),
    [
        ("one_for_all", r"expected \[1\] scores, got shape \[\]", 0),
        ("parses", "JSONDecodeError", 1),
        ("multiplies", "RuntimeError", 1),
    ],
)
def test_frames_of_libraries_are_left_out(folder, capsys, reward, message, frames):
    (folder / "images").mkdir()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "images/one.png")
    with pytest.raises(SystemExit) as stop:
        main(["rewards", "score", "images", "--reward", f"bad.r.{reward}"])
    assert stop.value.code == 3
    sentence, rest = said(capsys)
    assert re.search(message, sentence)
    files = [line for line in rest if line.startswith("  File ")]
    assert len(files) == frames
    assert all(f"{folder}/bad/r.py" in file for file in files)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{r: {reward: torch.mean, weight: 1}}", "'torch.mean': .*says nothing of its arguments"),
        ("{OCR: {reward: OCR, weight: 1, device: 'cuda:7'}}", "'OCR': expected a device like cpu .*got 'cuda:7': this"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(folder, monkeypatch, capsys, reward, message):
    monkeypatch.setattr("lightning_fdfo.module.FDFOModule.configure_model", lambda self: pytest.fail("it was loaded"))
    assert fit(monkeypatch, reward) == 2
    sentence, rest = said(capsys)
    assert re.search(message, sentence)
    assert not rest


@pytest.mark.parametrize("command", ["fit", "validate", "doctor"])
def test_commands_find_a_module_of_the_current_folder(folder, monkeypatch, capsys, command):
    """It is found, for what it leads to is no reward."""
    monkeypatch.setattr(sys, "argv", ["lightning-fdfo"])
    reward = "{bad.helper.deeper: 1.0}"
    with pytest.raises(SystemExit) as stop:
        main([command, f"--config={ROOT}/configs/quickstart.yaml", f"--model.rewards={reward}", *SMALL])
    assert stop.value.code == 2
    assert "deeper(images) is no reward: expected a function (images, prompts, metadata)" in said(capsys)[0]


def test_serve_reward_finds_it_too(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve-reward", "bad.r.Shape2", "--port", "0", "--init_args", "{gian: 2.0}"])
    assert stop.value.code == 2
    assert "bad.r.Shape2(gain=1.0): " in said(capsys)[0]


def test_the_first_command_of_write_a_reward_works_in_the_readers_folder(tmp_path):
    """The installed command, whose own folder stands first on Python's path."""
    page = (ROOT / "docs/write_a_reward.md").read_text(encoding="utf-8")
    title, code = re.search(r"^```python title=\"([^\"]+)\"\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE).groups()
    command = re.search(r"^```bash\n(.*?)$", page, flags=re.MULTILINE)[1]
    (tmp_path / title).parent.mkdir()
    (tmp_path / title).write_text(code, encoding="utf-8")
    program, *words = shlex.split(command)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [Path(sys.executable).parent / program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "my_package.redness.Redness keeps the contract" in done.stdout
