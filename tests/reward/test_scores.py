"""Masks: which scores there are, which pairs are dropped, and what is compared."""

import torch

from lightning_fdfo import RewardMix
from lightning_fdfo.reward.scores import Scores, compare, kept_pairs
from lightning_fdfo.reward.term import RewardTerm
from tests.conftest import brightness

# four pairs: the first is fine, the second is not routed to b, b fails on the third's second branch, the fourth is fine
VALUES = torch.tensor([3.0, 1.0, 0.0, 4.0, 5.0, 5.0, 2.0, 0.0])
ROUTED = torch.tensor([True, True, False, False, True, True, True, True])
SCORED = ROUTED & torch.tensor([True, True, True, True, True, False, True, True])
SCORES = {
    "a": Scores.of(VALUES),
    "b": Scores(torch.where(SCORED, 10 * VALUES, 0.0), SCORED, ROUTED, ROUTED.float()),
}


def test_a_pair_is_dropped_if_a_reward_fails_on_it_not_if_it_is_not_routed():
    assert SCORES["b"].failed.nonzero().flatten().tolist() == [5]
    assert kept_pairs(SCORES).tolist() == [True, True, False, True]


def test_what_is_compared_has_two_scores_in_a_pair_that_is_kept():
    differences = compare(SCORES)
    assert differences["a"].compared[::2].tolist() == [True, True, False, True]
    assert differences["b"].compared[::2].tolist() == [True, False, False, True]
    assert differences["b"].values[::2].tolist() == [10, 0, 0, 10]
    for values, compared in differences.values():
        assert torch.equal(values[::2], -values[1::2])
        assert torch.equal(compared[::2], compared[1::2])


def test_an_image_that_a_reward_failed_on_has_no_total():
    mix = RewardMix({"a": RewardTerm(brightness, 2.0), "b": RewardTerm(brightness, 0.5)})
    total = mix.total(SCORES)
    assert total.failed.tolist() == SCORES["b"].failed.tolist()
    assert total.values.tolist() == [21, 7, 0, 8, 35, 0, 14, 0]
    assert not any(values[4:6].any() for values in mix.contributions(SCORES, compare(SCORES)).values())


def test_batches_are_joined_and_cut():
    halves = [SCORES["b"].select(rows) for rows in (slice(0, 3), slice(3, 8))]
    for ours, theirs in zip(Scores.cat(halves), SCORES["b"], strict=True):
        assert torch.equal(ours, theirs)
