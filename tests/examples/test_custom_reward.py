"""examples/custom_reward, as its author would use it: installed in a fresh environment, listed, checked, trained with.

The environment sees this one's packages, so that nothing is downloaded; the plugin is in the fresh one alone.
"""

import csv
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples/custom_reward"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Runs a command of a fresh virtual environment in which the plugin is installed."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, capture_output=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # addsitedir, because editable installations are .pth files of their own
    (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    source = shutil.copytree(PLUGIN, folder / "source")

    def run(*command, check=True):
        line = [str(folder / "bin" / "python"), *command]
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "200"}
        done = subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)
        if check and done.returncode:
            raise AssertionError(done.stdout[-2000:] + done.stderr[-4000:])
        return done

    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", str(source))
    return run


def test_the_reward_is_twenty_lines():
    assert len((PLUGIN / "fdfo_redness/__init__.py").read_text().splitlines()) <= 22


def test_it_is_listed_with_its_distribution(environment):
    listed = environment("-m", "lightning_fdfo", "rewards").stdout
    assert "fdfo-redness 0.1.0" in listed
    assert any("Redness" in line and "-1 … 1" in line for line in listed.splitlines())
    assert "Redness" not in processes.run_checked(["rewards"]).stdout


def test_it_keeps_the_contract_and_passes_its_own_test(environment):
    assert "Redness keeps the contract" in environment("-m", "lightning_fdfo", "rewards", "check", "Redness").stdout
    tests = environment("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(PLUGIN), str(PLUGIN / "tests"))
    assert "2 passed" in tests.stdout


def test_its_options_are_checked(environment):
    spec = "{red: {reward: {class_path: Redness, init_args: {gain: -1}}}}"
    done = environment(
        "-m", "lightning_fdfo", "rewards", "score", str(ROOT / "docs/images"), "--reward", spec, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: Redness: expected gain > 0, got -1\n"


def test_it_trains(environment, tmp_path):
    environment(
        "-m", "lightning_fdfo", "fit", "--config", "configs/quickstart.yaml", "--model.rewards.Redness=0.5",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1", "--model.batching.num_pairs=8",
        "--model.batching.batch_size=32", "--model.evaluation.metrics=null", "--trainer.num_sanity_val_steps=0",
        "--trainer.check_val_every_n_epoch=1000",
    )  # fmt: skip
    with (tmp_path / "csv/version_0/metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert -1 <= float(row["reward/Redness/mean"]) <= 1
    assert float(row["reward/Redness/difference"]) > 0
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").stat().st_size > 0
