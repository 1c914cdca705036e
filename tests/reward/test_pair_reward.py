"""Rewards that compare two images: their contract, their place in a mixture, and runs that train by them."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_fdfo import Evaluation, PairReward, RewardMix
from lightning_fdfo.commands.score_folder import score_folder
from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.prompts import IndexedPrompt, Prompt
from lightning_fdfo.remote import RemotePairReward, RemoteReward
from lightning_fdfo.remote.client import RemoteError
from lightning_fdfo.remote.protocol import Limits
from lightning_fdfo.reward.against import score_against
from lightning_fdfo.reward.routing import routes
from lightning_fdfo.reward.scores import compare
from lightning_fdfo.reward.term import Gate, RewardTerm
from lightning_fdfo.testing import check_reward
from tests.conftest import ToyFlow, brightness, trainable
from tests.remote.conftest import serve  # noqa: F401 - a fixture
from tests.test_module import Recorder

IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
PROMPTS, METADATA = ["a cat", "a cat", "the dog", "the dog", "a bird", "a bird"], [{}] * 6


class Brighter(PairReward):
    """Prefers the brighter image, by so much."""

    def __init__(self, factor=5.0, validates=True):
        self.factor = factor
        self.validates = validates

    def __call__(self, first, second, prompts, metadata):
        assert len(first) == len(second) == len(prompts) == len(metadata)
        return (self.factor * (first - second).mean(dim=(1, 2, 3))).clamp(-1, 1)


class Wrong(PairReward):
    """Gives what it is told."""

    def __init__(self, value):
        self.value = value

    def __call__(self, first, second, prompts, metadata):
        return self.value(first) if callable(self.value) else self.value


class Picky(Brighter):
    """Fails on a prompt."""

    def __call__(self, first, second, prompts, metadata):
        if "the dog" in prompts:
            raise ValueError("no dogs")
        return super().__call__(first, second, prompts, metadata)


def preferences(factor=5.0):
    values = IMAGES.double().mean(dim=(1, 2, 3)).numpy()
    return np.clip(factor * (values[::2] - values[1::2]), -1, 1)


# In a mixture


def test_it_adds_half_of_its_preference_to_a_pairs_half_difference():
    terms = {
        "pairs": {"reward": Brighter(), "weight": 0.5, "clip": 0.3, "scale": 2.0},
        "scores": RewardTerm(brightness, 3.0),
    }
    mix = RewardMix(terms)
    scores = mix(IMAGES, PROMPTS, METADATA)
    np.testing.assert_allclose(scores["pairs"].values[::2], (1 + preferences()) / 2, rtol=1e-6)
    np.testing.assert_allclose(scores["pairs"].values[1::2], (1 - preferences()) / 2, rtol=1e-6)
    found = mix.contributions(scores, compare(scores))
    expected = 0.5 * np.clip(preferences() / 2 / 2.0, -0.3, 0.3)
    np.testing.assert_allclose(found["pairs"][::2], expected, rtol=1e-5)
    np.testing.assert_allclose(found["pairs"][1::2], -expected, rtol=1e-5)
    values = IMAGES.mean(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(found["scores"][::2], 3 * (values[::2] - values[1::2]) / 2, rtol=1e-4)


def test_a_route_a_schedule_and_a_gate_of_its_own_work_as_ever():
    gate = {"reward": "bright", "above": 0.5}
    mix = RewardMix(
        {
            "pairs": {"reward": Brighter(), "weight": {0: 0.0, 10: 2.0}, "gate": gate},
            "bright": RewardTerm(brightness, 0.0),
        }
    )
    facts = [{"rewards": {"bright": 1, "pairs": 3}}] * 2 + [{"rewards": {"bright": 1}}] * 2 + [{}] * 2
    scores = mix(IMAGES, PROMPTS, facts, routes=routes(mix.terms, facts))
    assert scores["pairs"].scored.tolist() == [True, True, False, False, True, True]
    found = mix.contributions(scores, compare(scores), epoch=5)["pairs"][::2].numpy()
    bright = IMAGES.mean(dim=(1, 2, 3)).view(3, 2)
    passing = (bright > 0.5).all(dim=1).numpy()
    np.testing.assert_allclose(found, passing * np.array([3, 0, 1]) * preferences() / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(6), r"expected \[3\] preferences, got shape \[6\]"),
        (torch.tensor([0.0, 1.5, 0.0]), "preference 1.5 for prompt 'the dog'"),
        (torch.tensor([0.0, 0.0, torch.nan]), "no preference on 1 of 3 pairs, first for 'a bird'"),
        (torch.tensor([0.0, torch.inf, 0.0]), "preference inf for prompt 'the dog'"),
    ],
)
def test_what_is_no_preference_is_a_failure(value, message):
    with pytest.raises(RewardError, match=message):
        RewardMix({"wrong": RewardTerm(Wrong(value))})(IMAGES, PROMPTS, METADATA)


def test_a_pair_that_fails_is_found_and_dropped():
    mix = RewardMix({"picky": RewardTerm(Picky())})
    with pytest.raises(RewardError, match=r"prompt 'the dog'.*no dogs") as failed:
        mix(IMAGES, PROMPTS, METADATA)
    assert failed.value.row == 2
    with pytest.warns(UserWarning, match="dropped, with its pair: prompt 'the dog'"):
        scores = mix(IMAGES, PROMPTS, METADATA, drop=True)["picky"]
    assert scores.scored.tolist() == [True, True, False, False, True, True]
    np.testing.assert_allclose(scores.values[[0, 4]], (1 + preferences()[[0, 2]]) / 2, rtol=1e-6)


def test_a_pair_that_was_not_compared_is_dropped():
    mix = RewardMix({"lazy": RewardTerm(Wrong(torch.tensor([0.5, torch.nan, -1.0])))})
    with pytest.warns(UserWarning, match="'lazy' has no preference on 1 of 3 pairs, first for 'the dog'"):
        scores = mix(IMAGES, PROMPTS, METADATA, drop=True)["lazy"]
    assert scores.scored.tolist() == [True, True, False, False, True, True]
    assert scores.values.tolist() == [0.75, 0.25, 0.0, 0.0, 0.0, 1.0]


def test_images_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match="'pairs' compares two images: expected pairs, got 5 images"):
        RewardMix({"pairs": RewardTerm(Brighter())})(IMAGES[:5], PROMPTS[:5], METADATA[:5])


def test_terms_that_make_no_sense():
    with pytest.raises(ConfigurationError, match="'pairs' compares two images, and gives none of them a score"):
        RewardMix({"pairs": RewardTerm(Brighter()), "b": RewardTerm(brightness, gate=Gate("pairs", above=0))})
    with pytest.raises(ConfigurationError, match="needs a reward that is differentiable, and Brighter is not"):
        RewardMix({"pairs": RewardTerm(Brighter(), gradient=True)})


# Against other images


def test_images_against_others_are_won_or_lost():
    mix = RewardMix({"pairs": RewardTerm(Brighter()), "bright": RewardTerm(brightness)})
    others = IMAGES.flip(0)
    found = score_against(mix, ["pairs"], IMAGES, others, PROMPTS, METADATA)
    assert list(found) == ["pairs"]
    values = [(images * 255).round().div(255).mean(dim=(1, 2, 3)).numpy() for images in (IMAGES, others)]
    expected = (1 + np.clip(5 * (values[0] - values[1]), -1, 1)) / 2
    np.testing.assert_allclose(found["pairs"].values, expected, rtol=1e-5)
    assert score_against(mix, ["pairs"], IMAGES, IMAGES, PROMPTS, METADATA)["pairs"].values.eq(0.5).all()


def batch(*texts):
    return [IndexedPrompt(index, Prompt(text, "", {}, "p:1")) for index, text in enumerate(texts)]


@pytest.mark.parametrize("lora", [True, False])
def test_validation_compares_with_the_base_models_images(toy_module, fit, prompts_file, lora):
    recorder, validated = Recorder(), Validated()
    options = {} if lora else {"lora": None}
    module = toy_module(rewards={"pairs": RewardTerm(Brighter(), 2.0)}, **options)
    fit(module, 20, val=str(prompts_file), callbacks=[recorder, validated], check_val_every_n_epoch=10)
    first, *_, last = validated.epochs  # the one before training
    assert first == {"val/pairs": 0.5, "val/reward": 1.0}
    assert last["val/pairs"] > 0.55
    assert last["val/reward"] == pytest.approx(2 * last["val/pairs"])
    assert "reward/pairs/mean" not in recorder.epochs[-1]
    assert recorder.epochs[-1]["reward/pairs/difference"] > 0
    assert recorder.epochs[-1]["reward/mean"] == pytest.approx(1.0)


class Validated(Recorder):
    """Keeps what validations log."""

    def on_validation_epoch_end(self, trainer, pl_module):
        self.epochs.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


def test_who_does_not_validate_is_left_out(toy_module, judge):
    module = toy_module(rewards={"pairs": RewardTerm(Brighter(validates=False)), "bright": RewardTerm(brightness)})
    (found,) = judge(module, "validate")
    assert list(found) == ["val/bright"]  # without a total, which would be another one than what trains
    module = toy_module(rewards={"pairs": RewardTerm(Brighter(validates=False), 0.0), "bright": RewardTerm(brightness)})
    (found,) = judge(module, "validate")
    assert found["val/reward"] == pytest.approx(found["val/bright"])


def test_a_test_gives_a_win_rate(toy_module, fit, judge):
    module = toy_module(
        rewards={"bright": RewardTerm(brightness)},
        evaluation=Evaluation(metrics={"pairs": RewardTerm(Brighter())}, num_resamples=99),
    )
    fit(module, 10)
    judge(module)
    rows = {row.name: row for row in module.comparison}
    assert rows["pairs"].tuned.mean + rows["pairs"].base.mean == pytest.approx(1)
    assert rows["pairs"].tuned.mean > 0.55
    assert rows["pairs"].win_rate.rate == rows["bright"].win_rate.rate > 0.9


# Runs


def test_a_run_learns_by_the_sign_of_a_score(toy_module, fit):
    recorder = Recorder()
    rewards = {"pairs": RewardTerm(Brighter(1e6)), "bright": RewardTerm(brightness, 0.0)}
    module = toy_module(rewards=rewards)
    fit(module, 30, callbacks=[recorder])
    means = [row["reward/bright/mean"] for row in recorder.epochs]
    assert means[-1] > means[0] + 0.1


def test_a_pair_rewards_difference_is_that_of_a_score(toy_module, fit):
    """The same preference, told as two scores, trains the same weights."""
    ends = []
    for reward in (Brighter(0.5), lambda images, prompts, metadata: 0.5 * images.mean(dim=(1, 2, 3))):
        module = toy_module(flow=ToyFlow(), rewards={"one": RewardTerm(reward)})
        fit(module, 3)
        ends.append(trainable(module))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)


# Other doors to it


def test_two_folders_are_compared(tmp_path):
    for folder, shade in (("a", 200), ("b", 100)):
        (tmp_path / folder).mkdir()
        for name in ("1.png", "2.png"):
            Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / folder / name)
    rewards = {"pairs": {"reward": Brighter(1.0)}, "bright": {"reward": brightness}}
    options = {"device": "cpu", "batch_size": 2}
    rows = score_folder(tmp_path / "a", rewards, None, against=tmp_path / "b", **options)
    assert [row.scores["pairs"] for row in rows] == pytest.approx([(1 + 100 / 255) / 2] * 2)
    assert rows[0].scores["bright"] == pytest.approx(200 / 255)
    with pytest.raises(ConfigurationError, match="'pairs' compares two images: give --against FOLDER"):
        score_folder(tmp_path / "a", rewards, None, **options)
    with pytest.raises(ConfigurationError, match="no reward here compares two images"):
        score_folder(tmp_path / "a", {"bright": rewards["bright"]}, None, against=tmp_path / "b", **options)
    Image.new("RGB", (9, 8)).save(tmp_path / "b/2.png")
    with pytest.raises(ConfigurationError, match=r"b/2\.png is of another size than"):
        score_folder(tmp_path / "a", rewards, None, against=tmp_path / "b", **options)
    (tmp_path / "b/1.png").unlink()
    with pytest.raises(ConfigurationError, match=r"expected an image named 1\.png there as well"):
        score_folder(tmp_path / "a", rewards, None, against=tmp_path / "b", **options)


@pytest.mark.parametrize("limits", [Limits(), Limits(max_batch=3)])
def test_it_may_be_elsewhere(serve, limits):  # noqa: F811
    url = serve(Brighter(), limits=limits).url
    away = RemotePairReward(url, reward="Brighter")
    expected = Brighter()(IMAGES[::2], IMAGES[1::2], PROMPTS[::2], METADATA[::2])
    found = away(IMAGES[::2], IMAGES[1::2], PROMPTS[::2], METADATA[::2])
    torch.testing.assert_close(found.float(), expected)
    check_reward(away)


def test_the_other_kind_of_server_is_named(serve):  # noqa: F811
    with pytest.raises(ConfigurationError, match=r"Brighter compares two images: use .*remote\.RemotePairReward"):
        RemoteReward(serve(Brighter()).url).fetch()
    with pytest.raises(ConfigurationError, match=r"JPEGSize scores single images: use .*remote\.RemoteReward"):
        RemotePairReward(serve("JPEGSize").url).fetch()
    with pytest.raises(RemoteError, match="a pair of images of 16 pixels is more than it takes"):
        RemotePairReward(serve(Brighter(), limits=Limits(max_batch=1)).url)(IMAGES[:1], IMAGES[:1], ["a"], [{}])
