"""examples/reward_mixing: run, collect, plot, at a small setting; and the numbers of made-up runs by hand."""

import csv
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "examples/reward_mixing"
SMALL = [
    "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--model.batching.num_pairs=4",
    "--model.batching.batch_size=16",
    "--model.sampling.num_steps=4", "--model.batching.rollout_batch_size=4",
]  # fmt: skip


def test_three_commands_from_mixtures_to_a_picture(python, tmp_path, capsys):
    prompts = tmp_path / "heldout.txt"
    prompts.write_text("".join((STUDY / "heldout.txt").read_text().splitlines(keepends=True)[:4]))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"OUT": str(tmp_path), "MIXTURES": "1:0:0 0:1:1", "SEEDS": "3", "JOBS": "1", "PATH": path}

    def run():
        words = [str(STUDY / "run.sh"), *SMALL, f"--data.val={prompts}"]
        return subprocess.run(words, cwd=ROOT, env=os.environ | own, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stderr + "".join(log.read_text() for log in tmp_path.glob("*/log.txt"))[-3000:]
    assert sorted(done.stdout.split()) == sorted(str(tmp_path / name) for name in ("1_0_0-3", "0_1_1-3"))
    assert run().stdout == ""  # both are complete
    python("collect.py", tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["mixture"], row["seed"]) for row in rows] == [("0:1:1", "3"), ("1:0:0", "3")]
    python("plot.py", tmp_path)
    assert "| 0 : 1 : 1 |" in capsys.readouterr().out
    with Image.open(tmp_path / "mixtures.png") as picture:
        assert picture.width > 1000


def made_up(folder, weights, seed, before, after):
    folder.mkdir()
    terms = {name: {"reward": name, "weight": w} for name, w in zip(("OCR", "small", "red"), weights, strict=True)}
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, "model": {"rewards": terms}}))
    names = ("exact_match", "small", "red")
    summary = {"before": dict(zip(names, before, strict=True)), "after": dict(zip(names, after, strict=True))}
    (folder / "before_after.json").write_text(json.dumps(summary))


def test_means_and_bars_are_those_of_the_seeds(python, tmp_path, capsys):
    made_up(tmp_path / "a-0", (1, 0.5, 0), 0, (0.5, -2.0, 0.0), (0.75, -1.5, 0.25))
    made_up(tmp_path / "a-1", (1, 0.5, 0), 1, (0.25, -3.0, 0.0), (1.0, -1.0, 0.5))
    python("collect.py", tmp_path)
    with (tmp_path / "results.csv").open() as file:
        plot = runpy.run_path(str(STUDY / "plot.py"))
        found = plot["spreads"](list(csv.DictReader(file)))
    assert found["1:0.5:0"] == {
        "exact_match": (75, 87.5, 100),
        "small": (1.0, 1.25, 1.5),
        "red": (0.25, 0.375, 0.5),
    }
    assert found["base"]["small"] == (2.0, 2.5, 3.0)
    figure = plot["draw"](found)
    first = figure.axes[0]
    assert (first.get_xlabel(), first.get_ylabel()) == ("JPEG, kilobytes", "read by OCR, %")
    assert first.get_legend_handles_labels()[1] == ["base", "1:0.5:0"]
    python("plot.py", tmp_path)
    assert "| 1 : 0.5 : 0 | 87.5 (75 to 100) | 1.25 (1 to 1.5) | 0.375 (0.25 to 0.5) |" in capsys.readouterr().out


def test_a_study_without_runs_is_told(python, tmp_path, capsys):
    with pytest.raises(SystemExit):
        python("collect.py", tmp_path)
    assert "holds no run that is complete" in capsys.readouterr().err


def test_the_sweep_moves_weights_and_reads_what_came_of_them(python, tmp_path, monkeypatch, capsys):
    """With a made-up Optuna, and a command that writes what a run would."""
    asked = []

    class Trial(types.SimpleNamespace):
        def suggest_float(self, name, low, high):
            return self.params.setdefault(name, (low + high) / (2 + self.number))

    class Study:
        def optimize(self, objective, n_trials):
            self.best_trials = [Trial(number=number, params={}) for number in range(n_trials)]
            for trial in self.best_trials:
                trial.values = objective(trial)

    def create_study(directions, **options):
        assert directions == ["maximize", "minimize"]
        assert options["load_if_exists"]
        return Study()

    def run(command, check, env):
        asked.append(command)
        folder = Path(next(word for word in command if "default_root_dir" in word).partition("=")[2])
        folder.mkdir(parents=True)
        after = {"exact_match": 0.5, "small": -1.25}
        (folder / "before_after.json").write_text(json.dumps({"after": after}))

    monkeypatch.setitem(sys.modules, "optuna", types.SimpleNamespace(create_study=create_study))
    monkeypatch.setattr(subprocess, "run", run)
    python("optuna_sweep.py", "--trials", 2, "--out", tmp_path / "out", "--trainer.max_epochs=1")
    assert capsys.readouterr().out.startswith("50.0% read, 1.25 kB: {'OCR': 0.5, 'small': 0.5, 'red': 0.5}\n")
    assert "--model.rewards.OCR.weight=0.3333333333333333" in asked[1]
    assert asked[0][-1] == "--trainer.max_epochs=1"


def test_the_readmes_table_is_the_runs():
    """The table of the README, from the numbers that lie beside it."""
    with (STUDY / "results.csv").open() as file:
        plot = runpy.run_path(str(STUDY / "plot.py"))
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    assert plot["table"](plot["spreads"](rows)) in (STUDY / "README.md").read_text(encoding="utf-8")
