"""examples/reward_hacking: the monitor stops a run whose reward is cheated; without it the pictures go white."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageStat

from lightning_fdfo.__main__ import main

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/reward_hacking"


@pytest.fixture
def fit(monkeypatch, tmp_path):
    def run(*more):
        monkeypatch.chdir(ROOT)
        monkeypatch.syspath_prepend(ROOT / EXAMPLE)
        monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
        configs = ["--config", "configs/quickstart.yaml", "--config", f"{EXAMPLE}/brightness.yaml"]
        quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
        main(["fit", *configs, *more, *quiet])

    return run


def whiteness(path):
    """Mean of all channels, 0 to 1."""
    with Image.open(path) as picture:
        return sum(ImageStat.Stat(picture.convert("RGB")).mean) / 3 / 255


SMALL = [
    "--model.batching.num_pairs=16",
    "--model.batching.batch_size=64",
    "--model.batching.rollout_batch_size=16",
    "--model.evaluation.metrics=null",
]
SHORT = ["--trainer.limit_val_batches=0", "--trainer.max_epochs=8"]


@pytest.mark.filterwarnings("ignore:epoch .*image/edge_density")
def test_a_cheated_reward_is_noticed(fit, tmp_path):
    fit("--config", f"{EXAMPLE}/watched.yaml", *SMALL, *SHORT)
    (first, *_) = json.loads((tmp_path / "reward_hacking.json").read_text())["events"]
    assert first["number"] == "image/edge_density"
    assert first["epoch"] < 7
    assert not list(tmp_path.glob(f"pairs/epoch={first['epoch'] + 1:03d}.csv"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:epoch .*image/edge_density")
def test_without_the_monitor_the_run_goes_on_to_white_paper(fit, tmp_path):
    fit()
    assert whiteness(tmp_path / "before.png") < 0.92
    assert whiteness(tmp_path / "after.png") > 0.94  # the grid between is grey
    result = json.loads((tmp_path / "before_after.json").read_text())
    assert result["after"]["brightness"] > result["before"]["brightness"]
    assert result["after"]["exact_match"] < 0.05 < 0.5 < result["before"]["exact_match"]
