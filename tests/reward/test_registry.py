import pickle
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

import lightning_fdfo
from lightning_fdfo import Reward
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward import available_rewards, load_reward, registry
from lightning_fdfo.reward.origin import describe


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


def shade(images, prompts, metadata, gain=1.0):
    """A plain function as a reward."""
    return gain * images.mean(dim=(1, 2, 3))


HERE = f"{__name__}.Constant"
FUNCTION = f"{__name__}.shade"
IMAGES = torch.rand(4, 3, 8, 8)
ROWS = (["p"] * 4, [{}] * 4)


class Distribution:
    def __init__(self, name):
        self.name, self.version = name, "1.0"


def plugin(name, value, distribution):
    return EntryPoint(name, value, registry.ENTRY_POINT_GROUP)._for(Distribution(distribution))


@pytest.fixture
def plugins(monkeypatch):
    def install(*entries):
        monkeypatch.setattr(registry, "entry_points", lambda group: list(entries))

    return install


def test_installed_rewards_are_listed_without_importing_them(monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_fdfo_rewards.ocr", raising=False)
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
    with pytest.raises(
        ConfigurationError, match=r"expected a subclass of lightning_fdfo.Reward or PairReward, or a function"
    ):
        load_reward("pathlib.Path")
    with pytest.raises(ConfigurationError, match="unexpected keyword argument 'volume'"):
        load_reward(HERE, volume=3.0)


def test_a_dotted_path_may_lead_to_a_plain_function():
    scorer = load_reward(FUNCTION, gain=2.0)
    assert scorer.name == "shade"
    assert torch.equal(scorer(IMAGES, *ROWS), 2 * IMAGES.mean(dim=(1, 2, 3)))
    with pytest.raises(ConfigurationError, match=r"shade.*unexpected keyword argument 'volume'"):
        load_reward(FUNCTION, volume=3.0)


def test_a_reward_pickles_by_its_configuration():
    constant = load_reward(HERE, value=3.0)
    constant._model = torch.zeros(10**6)
    pickled = pickle.dumps(constant)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert copy.value == 3.0
    assert not hasattr(copy, "_model")
    assert torch.equal(pickle.loads(pickle.dumps(load_reward(FUNCTION)))(IMAGES, *ROWS), shade(IMAGES, *ROWS))


def test_a_reward_is_described_with_its_distribution():
    assert describe(load_reward("JPEGSize")) == "JPEGSize of lightning-fdfo-rewards"
    assert describe(load_reward(FUNCTION)) == f"shade of the module {__name__}"


def test_the_distribution_is_that_of_the_entry_point_and_not_guessed(plugins):
    plugins(plugin("Same", f"{__name__}:Constant", "one"))
    assert describe(load_reward("Same")) == "Constant of one"
    assert describe(Constant()) == "Constant of one"
    assert describe(load_reward(HERE)) == "Constant of one"
    again = load_reward("Same")
    plugins()
    assert describe(again) == "Constant of one"
    assert describe(pickle.loads(pickle.dumps(again))) == f"Constant of the module {__name__}"


def test_missing_metadata_is_named():
    with pytest.raises(ConfigurationError, match=r"Constant needs metadata \['answer'\], got keys \['question'\]"):
        load_reward(HERE).check("p", {"question": 1})


def test_public_names_come_from_the_root_and_cost_nothing_until_used():
    script = (
        "import sys, lightning_fdfo; from lightning_fdfo import Reward; "
        "print('lightning' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert all(getattr(lightning_fdfo, name) for name in lightning_fdfo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Rewrad'"):
        lightning_fdfo.Rewrad  # noqa: B018


class Stubborn(Constant):
    def __init__(self):
        raise KeyError("surprise")


def test_a_constructor_that_breaks_is_named():
    with pytest.raises(ConfigurationError, match=r"Stubborn\(\): KeyError\('surprise'\)"):
        load_reward(f"{__name__}.Stubborn")
