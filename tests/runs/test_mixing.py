"""A mixture on the shipped model: two wishes that pull against each other, at three weightings."""

import csv
from pathlib import Path

import pytest
import yaml

from lightning_fdfo.__main__ import main

ROOT = Path(__file__).parents[2]
EPOCHS = 8
SMALL = [
    "--model.batching.num_pairs=32", "--model.batching.batch_size=128", "--model.evaluation.metrics=null",
    "--trainer.num_sanity_val_steps=0", "--trainer.check_val_every_n_epoch=1000",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains with two weights through the command, and returns the logged table: a row per epoch."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    rewards = yaml.safe_load((ROOT / "configs/legible_and_small.yaml").read_text())["model"]["rewards"]

    def run(legible, small, name="", epochs=EPOCHS):
        weighted = rewards | {
            "OCR": rewards["OCR"] | {"weight": legible},
            "small": rewards["small"] | {"weight": small},
        }
        folder = tmp_path / f"{legible}-{small}{name}"
        configs = ["--config=configs/quickstart.yaml", "--config=configs/legible_and_small.yaml"]
        main(["fit", *configs, f"--model.rewards={weighted}", f"--trainer.default_root_dir={folder}", *SMALL,
              f"--trainer.max_epochs={epochs}"])  # fmt: skip
        with (folder / "csv/version_0/metrics.csv").open() as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        assert len(rows) == epochs
        return rows

    return run


def late(rows, key):
    """Mean of the last three epochs."""
    return sum(row[key] for row in rows[-3:]) / 3


def untimed(rows):
    """The rows without what no two runs share."""
    timed = ("rollout/images_per_second", "train/points_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def check_shares(rows):
    """What the table says of two rewards that teach and one that is watched."""
    for row in rows:
        assert row["reward/OCR/share"] + row["reward/small/share"] == pytest.approx(1, abs=1e-4)
        assert 0 < row["reward/OCR/agrees_with/small"] < 1
        assert row["reward/colors/mean"] > 0  # watched
    assert "reward/colors/share" not in rows[0]


def test_the_table_says_how_much_each_reward_teaches_and_a_run_again_is_the_same(train):
    rows, again = train(1, 1, epochs=2), train(1, 1, "-again", epochs=2)
    check_shares(rows)
    assert untimed(again) == untimed(rows)


@pytest.mark.slow
def test_three_weightings_show_the_trade_off_in_the_logged_table(train):
    legible, both, small = (train(*weights) for weights in ((1, 0), (1, 1), (0, 1)))
    ocr, size = ([late(rows, f"reward/{name}/mean") for rows in (legible, both, small)] for name in ("OCR", "small"))
    assert ocr[0] > ocr[1] + 0.1 > ocr[2] + 0.2, ocr  # the less it weighs, the less legible
    assert size[0] + 0.02 < size[1] < size[2] - 0.02, size  # the more it weighs, the smaller (its sign is -1)
    assert late(legible, "reward/OCR/share") == pytest.approx(1)
    assert late(small, "reward/small/share") == pytest.approx(1)
    check_shares(both)
