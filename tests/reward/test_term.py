"""What a configuration may say of a term, and what each of it means."""

import numpy as np
import pytest

from lightning_fdfo import RewardMix
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.term import Gate, RewardTerm, parse_terms
from tests.conftest import brightness

LIGHT = f"{brightness.__module__}.brightness"


def term(**options):
    return {"reward": LIGHT} | options


def parse(**options):
    return parse_terms({"x": term(**options), "y": term(weight=0)})["x"]


def test_a_schedule_has_straight_lines_between_its_epochs():
    """By hand: from 2 in epoch 10 to 1 in epoch 30, then down to 0 within an epoch, as a step."""
    scheduled = parse(weight={10: 2, 30: 1, 31: 0})
    expected = {0: 2, 10: 2, 20: 1.5, 29: 1.05, 30: 1, 31: 0, 1000: 0}
    assert {epoch: scheduled.weight_at(epoch) for epoch in expected} == pytest.approx(expected)
    assert not scheduled.is_watched


def test_the_order_in_which_epochs_are_written_does_not_matter():
    backwards = parse(weight={20: 0.0, 0: 1.0})
    np.testing.assert_allclose([backwards.weight_at(epoch) for epoch in range(21)], np.linspace(1, 0, 21))


def test_a_number_is_the_weight_of_all_epochs():
    assert parse(weight=3).weight_at(7) == 3.0
    assert parse(weight=0).is_watched
    assert parse(weight={0: 0, 5: 0}).is_watched
    assert not parse(weight={0: 0, 5: 1}).is_watched


def test_a_term_may_have_it_all():
    parsed = parse(weight={0: 1}, scale="std", clip=3, gate={"reward": "y", "above": 0.8}, device="cpu")
    assert (parsed.weight, parsed.scale, parsed.clip, parsed.device) == ({0: 1.0}, "std", 3.0, "cpu")
    assert parsed.gate == Gate("y", above=0.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": {}}, r"as \{0: 1.0, 20: 0.3\}, got weight \{\}"),
        ({"weight": {"0": 1.0}}, "got weight"),
        ({"weight": {-1: 1.0}}, "got weight"),
        ({"weight": {0.5: 1.0}}, "got weight"),
        ({"weight": {True: 1.0}}, "got weight"),
        ({"weight": {0: "much"}}, "got weight"),
        ({"weight": {0: float("nan")}}, "got weight"),
        ({"weight": [1.0]}, "got weight"),
        ({"weight": {"schedule": "cosine"}}, "got weight"),
        ({"clip": 0}, "clip null or a number above 0, got clip 0"),
        ({"clip": -1}, "got clip -1"),
        ({"clip": "3"}, "got clip '3'"),
        ({"clip": float("inf")}, "got clip inf"),
        ({"gate": "y"}, r"a gate like \{reward: OCR, above: 0.8\}"),
        ({"gate": {"reward": "y"}}, "a gate like"),
        ({"gate": {"above": 1}}, "a gate like"),
        ({"gate": {"reward": 3, "above": 1}}, "a gate like"),
        ({"gate": {"reward": "y", "over": 1}}, "a gate like"),
        ({"gate": {"reward": "y", "above": "high"}}, "a gate like"),
        ({"gate": {"reward": "y", "above": True}}, "a gate like"),
        ({"gate": {"reward": "y", "above": float("nan")}}, "a gate like"),
        ({"gate": {"reward": "y", "above": None, "below": 1}}, "a gate like"),
        ({"gate": {"reward": "y", "above": 2, "below": 1}}, "with above the smaller"),
        ({"gate": Gate("y")}, "a gate like"),
    ],
)
def test_what_makes_no_sense_is_told(options, message):
    with pytest.raises(ConfigurationError, match=rf"^rewards\.x: .*{message}"):
        parse(**options)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"a": "z"}, "rewards.a: .* 'z' is not in the mixture"),
        ({"a": "a"}, "rewards.a: .* 'a' has a gate itself"),
        ({"a": "b", "b": "a"}, "rewards.a: .* of c; 'b' has a gate itself"),
        ({"a": "b", "b": "c"}, "rewards.a: .* 'b' has a gate itself"),
    ],
)
def test_gates_lead_to_terms_without_one(gates, message):
    terms = {
        name: term(gate={"reward": gates[name], "above": 0}) if name in gates else term(weight=0) for name in "abc"
    }
    with pytest.raises(ConfigurationError, match=message):
        RewardMix(terms)


def test_in_python_a_term_is_checked_too():
    for wrong in (RewardTerm(brightness, clip=-1), RewardTerm(brightness, {}), RewardTerm(brightness, gate=Gate("y"))):
        with pytest.raises(ConfigurationError, match=r"rewards\.x: expected"):
            RewardMix({"x": wrong, "y": RewardTerm(brightness)})


def test_a_name_of_ones_own_with_a_number_says_how_it_is_meant():
    with pytest.raises(ConfigurationError, match=r"rewards.small: unknown reward 'small'.*\{reward: NAME, weight"):
        RewardMix({"small": 0.3})


def test_a_gate_is_a_mapping_in_a_python_term_too():
    given = RewardTerm(brightness, gate={"reward": "b", "above": 1.0})
    assert parse_terms({"a": given, "b": RewardTerm(brightness)})["a"].gate == Gate("b", above=1.0)
