"""The table of pairs, against the numbers that it was made of."""

import csv
import json

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fdfo.callbacks.pair_log import PairLog
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.term import Gate, RewardTerm
from tests.conftest import brightness


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2))


def fragile(images, prompts, metadata):
    if any(prompt == "bad" for prompt in prompts):
        raise OSError("no")
    return images[:, 1].mean(dim=(1, 2))


REWARDS = {
    "light": RewardTerm(brightness, {0: 1.0, 2: 2.0}),
    "red": RewardTerm(redness, 0.5, "std", clip=1.0, gate=Gate("light", above=0.4)),
    "fragile": RewardTerm(fragile, -0.3),
}
PROMPTS = [
    {"prompt": 'comma, "quotes"'},
    {"prompt": "all", "rewards": {"light": 1, "red": 2, "fragile": 1}},
    {"prompt": "=1+1", "rewards": {"light": 1, "fragile": 0}},
    {"prompt": "bad"},
]


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(cell):
    return float(cell) if cell else float("nan")


@pytest.fixture
def run(toy_module, fit, tmp_path):
    """Fits with the mixture above; returns the module."""
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")

    def start(epochs, folder, rewards=REWARDS, **options):
        module = toy_module(rewards=rewards, on_reward_error="drop_pair", max_dropped=0.5)
        callbacks = [PairLog(), *options.pop("callbacks", [])]
        fit(module, epochs, train=str(train), callbacks=callbacks, default_root_dir=tmp_path / folder, **options)
        return module

    return start


@pytest.mark.filterwarnings("ignore:dropped, with its pair")
def test_a_row_a_pair_says_what_each_term_did(run, tmp_path):
    module = run(2, "run")
    assert sorted(path.name for path in (tmp_path / "run/pairs").iterdir()) == ["epoch=000.csv", "epoch=001.csv"]
    rows = read(tmp_path / "run/pairs/epoch=001.csv")
    assert [(row["epoch"], row["pair"]) for row in rows] == [("1", str(pair)) for pair in range(16)]
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in PROMPTS}
    assert list(rows[0]) == [
        "epoch", "pair", "prompt", "dropped", "difference",
        *(f"{name}/{column}" for name in REWARDS for column in ("first", "second", "part", "share")),
    ]  # fmt: skip
    std = module.rewards.running["red"].std
    for row in rows:
        scores = {name: [number(row[f"{name}/{branch}"]) for branch in ("first", "second")] for name in REWARDS}
        route = next(prompt for prompt in PROMPTS if prompt["prompt"] == row["prompt"]).get("rewards")
        if row["prompt"] == "bad":
            assert row["dropped"] == "1"
            assert not any(row[f"{name}/{column}"] for name in REWARDS for column in ("part", "share"))
            assert (row["difference"], row["fragile/first"]) == ("", "")
            assert np.isfinite(scores["light"]).all()
            continue
        route = route or dict.fromkeys(REWARDS, 1)
        half = {name: (one - two) / 2 for name, (one, two) in scores.items()}
        bounded = np.clip(half["red"] / std, -1, 1) if min(scores["light"]) > 0.4 else 0.0
        parts = {"light": 1.5 * half["light"], "red": 0.5 * bounded, "fragile": -0.3 * half["fragile"]}
        parts = {name: part * route[name] if name in route else 0.0 for name, part in parts.items()}
        total = sum(parts.values())
        assert row["dropped"] == "0"
        assert number(row["difference"]) == pytest.approx(total, rel=1e-4, abs=1e-6)
        for name, part in parts.items():
            assert number(row[f"{name}/part"]) == pytest.approx(part, rel=1e-4, abs=1e-6)
            assert number(row[f"{name}/share"]) == pytest.approx(part / total, rel=1e-2, abs=1e-3)
            assert (row[f"{name}/first"] == "") == (name not in route)


@pytest.mark.filterwarnings("ignore:dropped, with its pair")
def test_the_table_holds_every_digit_of_the_scores(run, tmp_path):
    module = run(1, "run")
    rows = read(tmp_path / "run/pairs/epoch=000.csv")
    written = torch.tensor([number(row[f"light/{branch}"]) for row in rows for branch in ("first", "second")])
    assert torch.equal(written, module.collector.scores.scores["light"].values)


@pytest.mark.filterwarnings("ignore:dropped, with its pair")
def test_a_resumed_run_writes_the_same_tables(run, tmp_path):
    """Two epochs, then the second again and a third, from the checkpoint after the first."""
    whole, resumed = tmp_path / "whole/pairs", tmp_path / "resumed/pairs"
    run(3, "whole")

    def saving():
        save = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
        return {"callbacks": [save], "enable_checkpointing": True}

    run(2, "resumed", **saving())
    second = resumed / "epoch=001.csv"
    before = second.read_bytes()
    second.write_bytes(b"half a tab")
    run(3, "resumed", ckpt_path=str(tmp_path / "saved/epoch=0.ckpt"), **saving())
    assert second.read_bytes() == before
    for path in whole.iterdir():
        assert (resumed / path.name).read_bytes() == path.read_bytes()
    assert len(list(resumed.iterdir())) == 3  # no file of another name is left


@pytest.mark.filterwarnings("ignore:.* pairs score alike", "ignore:none of the 16 pairs", "ignore:no pair of any")
def test_no_difference_no_shares(run, tmp_path):
    run(1, "run", rewards={"flat": RewardTerm(lambda images, *_: torch.ones(len(images))), "light": RewardTerm(
        brightness, 0), "red": RewardTerm(redness, 0), "fragile": RewardTerm(redness, 0)})  # fmt: skip
    for row in read(tmp_path / "run/pairs/epoch=000.csv"):
        assert (row["difference"], row["flat/part"], row["flat/share"]) == ("0", "", "") or row["flat/part"] == "0"
        assert row["flat/share"] == ""


def test_another_module_is_refused():
    with pytest.raises(ConfigurationError, match="PairLog: expected an FDFOModule, got LightningModule"):
        PairLog().setup(None, LightningModule(), "fit")
