import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from lightning_fdfo import Reward, RewardMix, reward
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward import RewardTerm, available_rewards, load_reward


class Constant(Reward):
    """A plugin's reward, found by its dotted path."""

    required_metadata = ("answer",)

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.device = None

    def setup(self, device):
        self.device = device

    def __call__(self, images, prompts, metadata):
        return torch.full((len(images),), self.value)


HERE = f"{__name__}.Constant"
IMAGES = torch.zeros(4, 3, 8, 8)
ROWS = (["p"] * 4, [{}] * 4)


class Distribution:
    def __init__(self, name):
        self.name, self.version = name, "1.0"


def plugin(name, value, distribution):
    return EntryPoint(name, value, reward.ENTRY_POINT_GROUP)._for(Distribution(distribution))


@pytest.fixture
def plugins(monkeypatch):
    def install(*entries):
        monkeypatch.setattr(reward, "entry_points", lambda group: list(entries))

    return install


def test_installed_rewards_are_listed_without_importing_them():
    sys.modules.pop("lightning_fdfo_rewards.ocr", None)
    assert {"OCR", "JPEGSize"} <= set(available_rewards())
    assert "lightning_fdfo_rewards.ocr" not in sys.modules


def test_a_name_given_twice_names_both_distributions(plugins):
    fine = HERE.replace(".Constant", ":Constant")
    plugins(plugin("A", fine, "one"), plugin("A", "other:A", "two"), plugin("B", fine, "one"))
    with pytest.raises(ConfigurationError, match="'A' is given by two distributions, one and two"):
        load_reward("A")
    assert isinstance(load_reward("B"), Constant)


def test_the_same_entry_twice_on_the_path_is_one(plugins):
    plugins(plugin("A", "m:A", "one"), plugin("A", "m:A", "one"))
    assert list(available_rewards()) == ["A"]


def test_unknown_names_get_a_guess(plugins):
    plugins(plugin("Constant", "m:A", "one"))
    with pytest.raises(
        ConfigurationError, match=r"unknown reward 'Konstant' \(did you mean 'Constant'\?\); installed: Constant"
    ):
        load_reward("Konstant")
    plugins()
    with pytest.raises(ConfigurationError, match="installed: none: pip install lightning-fdfo-rewards"):
        load_reward("OCR")


def test_a_plugin_that_fails_to_import_is_named(plugins):
    plugins(plugin("Broken", "no_such_module_here:A", "broken-rewards"))
    with pytest.raises(ConfigurationError, match=r"'Broken' of broken-rewards cannot be imported.*no_such_module_here"):
        load_reward("Broken")


def test_dotted_paths_need_no_packaging():
    assert load_reward(HERE, value=3.0).value == 3.0
    with pytest.raises(ConfigurationError, match=r"expected a subclass of lightning_fdfo.Reward"):
        load_reward("pathlib.Path")
    with pytest.raises(ConfigurationError, match="unexpected keyword argument 'volume'"):
        load_reward(HERE, volume=3.0)


def test_the_total_is_the_weighted_sum_and_weight_zero_only_watches():
    mix = RewardMix(
        {
            "a": {"reward": {"class_path": HERE, "init_args": {"value": 2.0}}, "weight": 0.5},
            "b": {"reward": HERE, "weight": 3},
            "watched": {"reward": {"class_path": HERE, "init_args": {"value": 100.0}}, "weight": 0},
        }
    )
    scores = mix(IMAGES, *ROWS)
    assert torch.equal(scores.total, torch.full((4,), 0.5 * 2 + 3 * 1))
    assert {name: term[0].item() for name, term in scores.terms.items()} == {"a": 2, "b": 1, "watched": 100}


def test_setup_and_check_reach_each_reward():
    mix = RewardMix({HERE: 1.0})
    mix.setup(torch.device("cpu"))
    assert mix.terms[HERE].reward.device == torch.device("cpu")
    with pytest.raises(ConfigurationError, match=r"Constant needs metadata \['answer'\], got keys \['question'\]"):
        mix.check("p", {"question": 1})


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "expected at least one"),
        ({"x": "heavy"}, "rewards.x: expected a weight or"),
        ({"x": True}, "rewards.x: expected a weight or"),
        ({"x": {"weight": 1}}, "rewards.x: expected a weight or"),
        ({"x": {"reward": HERE, "wieght": 1}}, "wieght"),
        ({"x": {"reward": HERE, "weight": "1"}}, "got weight '1'"),
        ({"x": {"reward": {"class": HERE}}}, "got reward {'class'"),
        ({"x": {"reward": 7}}, "got reward 7"),
        ({"Nothing": 1.0}, "unknown reward 'Nothing'"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(terms, message):
    with pytest.raises(ConfigurationError, match=message):
        RewardMix(terms)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.tensor([1.0, float("nan"), 0, 0]), "'r': score nan for prompt 'p'"),
        (torch.tensor([1.0, float("-inf"), 0, 0]), "'r': score -inf"),
        (torch.zeros(3), r"'r': expected \[4\] scores, got shape \[3\]"),
        (torch.zeros(4, 1), r"got shape \[4, 1\]"),
    ],
)
def test_a_failure_is_never_a_score(scores, message):
    mix = RewardMix({"r": RewardTerm(lambda *_: scores)})
    with pytest.raises(ValueError, match=message):
        mix(IMAGES, *ROWS)


def test_rewards_are_scored_outside_of_the_trainers_autocast():
    weights = torch.randn(3 * 8 * 8, 1)
    mix = RewardMix({"linear": RewardTerm(lambda images, *_: (images.flatten(1) @ weights)[:, 0])})
    images = torch.rand(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (images.flatten(1) @ weights).dtype == torch.bfloat16
        inside = mix(images, *ROWS).total
    assert torch.equal(inside, mix(images, *ROWS).total)
