"""A run that cannot learn is refused, or says so by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_fdfo import Sampling
from lightning_fdfo.__main__ import main
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.guards.untrainable_settings import cannot_learn
from lightning_fdfo.reward.term import Gate, RewardTerm
from tests.conftest import ToyFlow, brightness

ROOT = Path(__file__).parent.parent.parent


def constant(images, prompts, metadata):
    return torch.full((len(images),), 0.25)


def rounded(images, prompts, metadata):
    return brightness(images, prompts, metadata).round()


def sampling(**options):
    return Sampling(**{"num_steps": 4, "height": 2, "width": 2, "churn": 0.1} | options)


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": {"a": RewardTerm(brightness, 0)}}, "all weights are 0 in all epochs"),
        ({"rewards": {"a": RewardTerm(brightness, {0: 0, 2: 0, 9: 1})}}, "all weights are 0 in all epochs"),
        ({"sampling": sampling(churn=0)}, "the two images of every pair are equal"),
        (
            {"sampling": sampling(num_steps=1, initial_churn=0), "batch_size": 16},
            "the two images of every pair are equal",
        ),
        ({"optimizer": sgd(0.0)}, "the learning rate is 0 at every step"),
        (
            {"optimizer": sgd(0.0), "lr_scheduler": lambda optimizer: LambdaLR(optimizer, lambda step: step + 1.0)},
            "the learning rate is 0 at every step",
        ),
    ],
)
def test_what_can_be_known_is_refused_before_the_model_is_loaded(toy_module, fit, monkeypatch, options, message):
    monkeypatch.setattr(ToyFlow, "load", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigurationError, match=message):
        fit(toy_module(**options), 2)


@pytest.mark.parametrize(
    "options",
    [
        {"rewards": {"a": RewardTerm(brightness, {0: 0, 9: 1})}},
        {"sampling": sampling(churn=0, initial_churn=0.1)},
        {"sampling": sampling(num_steps=1)},
        {
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.0),
            "lr_scheduler": lambda optimizer: OneCycleLR(optimizer, max_lr=1e-2, total_steps=20),
        },
    ],
)
def test_what_may_learn_is_not_refused(toy_module, options):
    assert cannot_learn(toy_module(**options), 2) == []


@pytest.fixture
def reported(toy_module, fit):
    """The warnings of a run of three epochs."""

    def run(**options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(toy_module(**options), 3)
        return [str(one.message) for one in caught if "pair" in str(one.message) or "reward" in str(one.message)]

    return run


def test_a_run_that_learns_says_nothing(reported):
    assert reported() == []


def test_a_constant_reward_is_said_once_by_name_and_that_nothing_has_trained(reported):
    assert reported(rewards={"flat": RewardTerm(constant)}) == [
        "none of the 16 pairs of epoch 0 has a difference, so that nothing trains in it: "
        "no reward tells the images of a pair apart",
        "reward flat: 16 of 16 pairs score alike, and teach nothing: the score is constant, 0.25 for every image",
        "no pair of any epoch of this process had a difference: they taught nothing",
    ]


def test_a_constant_reward_beside_one_that_teaches(reported):
    (said,) = reported(rewards={"flat": RewardTerm(constant, scale="std"), "bright": RewardTerm(brightness)})
    assert said.startswith("reward flat: 16 of 16 pairs score alike")


def test_rounded_scores_are_called_so(reported):
    (said,) = [line for line in reported(rewards={"steps": RewardTerm(rounded)}) if line.startswith("reward")]
    assert said.endswith("use a smoother score")


def test_a_gate_that_is_shut_names_the_scores_that_it_waits_for(reported):
    gate = Gate("bright", above=2.0)
    said = reported(rewards={"bright": RewardTerm(brightness, 0.1), "gated": RewardTerm(brightness, gate=gate)})
    assert len(said) == 1
    assert said[0].startswith("reward gated: its gate (bright above 2, below inf) lets no pair pass")
    assert "bright scored 0." in said[0]


def test_equal_images_are_named_as_the_cause(reported, monkeypatch):
    monkeypatch.setattr("lightning_fdfo.rollout.pairs.churns_on", lambda *_, **__: torch.zeros(5))
    said = reported()
    assert said[0].endswith("the two images of each pair are equal: raise sampling.churn")


def test_a_watched_reward_may_tie(reported):
    assert reported(rewards={"flat": RewardTerm(constant, 0), "bright": RewardTerm(brightness)}) == []


def test_a_model_without_a_weight_that_trains_is_one_line(toy_module, fit, monkeypatch):
    monkeypatch.setattr(ToyFlow, "train_all", lambda self: None)
    with pytest.raises(ConfigurationError, match="the model has no weight that trains"):
        fit(toy_module(lora=None), 1)


@pytest.mark.parametrize("name", ["fit", "doctor"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.rewards.OCR=0", "all weights are 0"),
        ("--model.sampling.churn=0", "the two images of every pair are equal"),
        ("--model.optimizer.init_args.lr=0", "the learning rate is 0 at every step"),
    ],
)
def test_the_shipped_quick_start_is_refused_by_fit_and_doctor_alike(
    name, option, message, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    monkeypatch.setattr("lightning_fdfo.FDFOModule.configure_model", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        main([name, "--config=configs/quickstart.yaml", f"--trainer.default_root_dir={tmp_path / 'run'}", option])
    out, err = capfd.readouterr()
    assert stop.value.code == (2 if name == "fit" else 1)
    assert message in (err if name == "fit" else out)
    assert not (tmp_path / "run/config.yaml").exists()
