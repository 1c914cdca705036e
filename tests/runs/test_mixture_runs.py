"""A mixture with all of it, through the command on the shipped model: on one process, on two, and resumed."""

import csv
import json
import math

import pytest
import torch
import yaml

from lightning_fdfo import PairReward
from tests import processes

EPOCHS = 3
NAMES = ("OCR", "colors", "dark", "brighter")
PROMPTS = [
    {"prompt": '"12" in red', "rewards": {"OCR": 1, "colors": 0.5, "dark": 1}},
    {"prompt": "a red sofa", "rewards": {"colors": 1, "dark": 0}},  # no text to read
    {"prompt": '"345" in blue'},
    {"prompt": '"6" in green', "rewards": {"OCR": 2}},
]


def darkness(images, prompts, metadata):
    return 1 - images.mean(dim=(1, 2, 3))


class Brighter(PairReward):
    """A judge of two images."""

    def __call__(self, first, second, prompts, metadata):
        return (5 * (first - second).mean(dim=(1, 2, 3))).tanh()


def overlay(folder):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    config = {
        "model": {
            "rewards": {
                "OCR": {"reward": "OCR", "weight": {0: 1.0, 2: 0.2}, "scale": "std", "clip": 1.0},
                "colors": {"reward": "Colorfulness", "weight": 0.5, "scale": "std"},
                "dark": {
                    "reward": f"{__name__}.darkness",
                    "weight": {0: 0.0, 2: 1.0},
                    "scale": "std",
                    "gate": {"reward": "colors", "above": 50.0},
                },
                "brighter": {"reward": f"{__name__}.Brighter", "weight": 0.5, "scale": "std"},
            },
            "evaluation": {"metrics": None},
            "sampling": {"num_steps": 2},
            "batching": {"num_pairs": 16, "num_points_per_pair": None, "rollout_batch_size": 1},
            "lora": {"rank": 4, "alpha": 4},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        },
        "data": {"train": str(folder / "train.jsonl"), "val": str(folder / "train.jsonl"), "val_batch_size": 3},
        "trainer": {
            "max_epochs": EPOCHS,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": 1,
            "enable_progress_bar": False,
            "logger": [
                {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(folder / "run"), "name": "csv"},
                }
            ],
            "callbacks": [
                {"class_path": "lightning_fdfo.callbacks.PairLog"},
            ],
        },
    }
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def fit(folder, *more, devices=1):
    ways = {
        1: [],  # batches of 32 points, as two devices' 16 and 16: train/drift is that of the epoch's first batch
        2: ["--config=configs/ddp.yaml", "--trainer.devices=2"],
    }
    arguments = ["--config=configs/quickstart.yaml", f"--config={overlay(folder)}", *ways[devices], *more]
    processes.run_checked(["fit", *arguments, f"--trainer.default_root_dir={folder / 'run'}"], devices)
    return folder / "run"


def logged(run, version=0):
    """Epoch -> all numbers that do not measure time, as they were written."""
    epochs = {}
    with (run / f"csv/version_{version}/metrics.csv").open() as file:
        for row in csv.DictReader(file):
            kept = {name: value for name, value in row.items() if value and "second" not in name and name != "step"}
            epochs.setdefault(int(row["epoch"]), {}).update(kept)
    return epochs


def pairs(run, epoch):
    with (run / f"pairs/epoch={epoch:03d}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("two"), devices=2)


def test_the_mixture_does_what_it_says(one):
    epochs = logged(one)
    for epoch in range(EPOCHS):
        rows, numbers = pairs(one, epoch), {name: float(value) for name, value in epochs[epoch].items()}
        assert all(math.isfinite(value) for value in numbers.values())
        assert 0 < numbers["reward/dark/gated"] < 1
        shares = [numbers.get(f"reward/{name}/share", 0.0) for name in NAMES]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert (shares[2] == 0) == (epoch == 0)  # its weight starts at 0
        assert -1 <= numbers["reward/OCR/rank_correlation/colors"] <= 1
        for row in rows:
            assert (row["OCR/first"] == "") == (row["prompt"] == "a red sofa")
            assert (row["colors/first"] == "") == (row["prompt"] == '"6" in green')
            factor = 2 if row["prompt"] == '"6" in green' else 1
            assert abs(float(row["OCR/part"])) <= factor * (1.0, 0.6, 0.2)[epoch] + 1e-6
        read = [float(row[f"OCR/{branch}"]) for row in rows for branch in ("first", "second") if row["OCR/first"]]
        assert numbers["reward/OCR/mean"] == pytest.approx(sum(read) / len(read), rel=1e-5)
        judged = [row for row in rows if row["brighter/first"]]
        assert judged
        assert all(float(row["brighter/first"]) + float(row["brighter/second"]) == pytest.approx(1) for row in judged)
        assert 0 < numbers["val/brighter"] < 1
        total = sum(abs(float(row["difference"])) for row in rows) / len(rows)
        assert numbers["reward/difference"] == pytest.approx(total, rel=1e-5)
        assert {name for name in numbers if name.startswith("val/")} == {
            "val/reward", "val/OCR", "val/colors", "val/dark", "val/brighter"
        }  # fmt: skip


def test_two_processes_log_what_one_logs(one, two):
    alone, together = logged(one), logged(two)
    assert {epoch: set(numbers) for epoch, numbers in alone.items()} == {
        epoch: set(numbers) for epoch, numbers in together.items()
    }
    for epoch, numbers in alone.items():
        ours = {name: float(value) for name, value in numbers.items()}
        theirs = {name: float(value) for name, value in together[epoch].items()}
        assert theirs == pytest.approx(ours, rel=1e-2, abs=1e-3)
    for epoch in range(EPOCHS):
        for ours, theirs in zip(pairs(one, epoch), pairs(two, epoch), strict=True):
            assert [ours[key] for key in ("epoch", "pair", "prompt", "dropped")] == [
                theirs[key] for key in ("epoch", "pair", "prompt", "dropped")
            ]
            for name in NAMES:
                for key in (f"{name}/first", f"{name}/second", f"{name}/part"):
                    assert (ours[key] == "") == (theirs[key] == "")
                    # an OCR engine magnifies the last digits of weights: other pairs would differ by ones
                    assert float(theirs[key] or 0) == pytest.approx(float(ours[key] or 0), rel=2e-2, abs=2e-2)


def test_two_processes_train_what_one_trains(one, two):
    weights = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_stops_goes_on_to_the_bit(request, tmp_path, devices):
    whole = request.getfixturevalue("one" if devices == 1 else "two")
    resumed = fit(tmp_path, "--trainer.max_epochs=2", devices=devices)
    fit(tmp_path, "--ckpt_path=last", devices=devices)
    before, after = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (whole, resumed))
    assert before["reward_scales"] == after["reward_scales"]
    assert all(torch.equal(value, after["state_dict"][name]) for name, value in before["state_dict"].items())
    for epoch in range(EPOCHS):
        name = f"pairs/epoch={epoch:03d}.csv"
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert logged(resumed, version=1) == {EPOCHS - 1: logged(whole)[EPOCHS - 1]}
