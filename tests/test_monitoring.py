"""The epoch's numbers against a few lines of arithmetic."""

import pytest
import torch

from lightning_fdfo import Reward, RewardMix
from lightning_fdfo.flow import Conditioning
from lightning_fdfo.judgement import gather, judge, own_rows
from lightning_fdfo.monitoring import rollout_metrics
from lightning_fdfo.reward_term import RewardTerm
from lightning_fdfo.rollout import Rollout
from lightning_fdfo.sampling import Trajectories

# four pairs: rows 2i and 2i + 1
A = torch.tensor([3.0, 1.0, 0.0, 4.0, 5.0, 5.0, 2.0, 0.0])
B = torch.tensor([10.0, 30.0, 0.0, 20.0, 7.0, 1.0, 4.0, 4.0])


class Cost(Reward):
    higher_is_better = False

    def __call__(self, images, prompts, metadata):
        raise NotImplementedError


def rollout(scores, pairs=range(4), routes=None):
    rows = slice(2 * pairs.start, 2 * pairs.stop)
    latents = torch.zeros(8, 2, 1, 2, 2)
    latents[::2, -1] = 1.0  # half differences of 1/2 everywhere
    trajectories = Trajectories(latents[rows], torch.zeros(8, 1, 1, 2, 2)[rows])
    routes = {name: torch.ones(8) for name in scores} | (routes or {})
    scores, routes = ({name: values[rows] for name, values in columns.items()} for columns in (scores, routes))
    return Rollout(pairs, torch.tensor([1.0, 0.0]), trajectories, Conditioning({}), scores, routes, seconds=2.0)


def judged(scores, mix, routes=None, epoch=0):
    return judge(gather(rollout(scores, routes=routes), 4, lambda sums: sums), mix, epoch)


def measure(scores, mix, routes=None, epoch=0):
    return rollout_metrics(judged(scores, mix, routes, epoch), mix, epoch)


def nothing(images, prompts, metadata):
    raise NotImplementedError


def test_numbers_of_each_term_and_of_the_total():
    metrics = measure({"a": A, "b": B}, RewardMix({"a": RewardTerm(nothing, 2.0), "b": RewardTerm(nothing, 0.1)}))
    total = 2 * A + 0.1 * B
    # half differences of rows 2i: a: 1, -2, 0, 1; b: -10, -10, 3, 0
    assert metrics["reward/mean"] == pytest.approx(total.mean().item())
    assert metrics["reward/std"] == pytest.approx(total.std(correction=0).item(), rel=1e-5)
    assert metrics["reward/a/mean"] == pytest.approx(A.mean().item())
    assert metrics["reward/b/std"] == pytest.approx(B.std(correction=0).item(), rel=1e-5)
    assert metrics["reward/a/difference"] == pytest.approx((1 + 2 + 0 + 1) / 4)
    assert metrics["reward/b/difference"] == pytest.approx((10 + 10 + 3 + 0) / 4)
    assert metrics["reward/a/ties"] == metrics["reward/b/ties"] == 1 / 4
    # total: 2 - 1, -4 - 1, 0 + 0.3, 2 + 0
    assert metrics["reward/difference"] == pytest.approx((1 + 5 + 0.3 + 2) / 4)
    assert metrics["reward/ties"] == 0
    assert metrics["rollout/pair_distance"] == pytest.approx(0.5)


def test_shares_say_who_decided_and_sum_to_one():
    metrics = measure({"a": A, "b": B}, RewardMix({"a": RewardTerm(nothing, 2.0), "b": RewardTerm(nothing, 0.1)}))
    assert metrics["reward/a/share"] == pytest.approx((2 + 4 + 0 + 2) / 8.3)
    assert metrics["reward/b/share"] == pytest.approx((-1 + 1 + 0.3 + 0) / 8.3)
    assert metrics["reward/a/share"] + metrics["reward/b/share"] == pytest.approx(1)


def test_agreement_counts_pairs_that_are_a_tie_for_neither():
    metrics = measure({"a": A, "b": B}, RewardMix({"a": RewardTerm(nothing), "b": RewardTerm(nothing, 0)}))
    assert metrics["reward/a/agrees_with/b"] == 1 / 2  # the second of the first two pairs
    assert "reward/b/share" not in metrics  # it is only watched


def test_a_cost_agrees_with_its_opposite():
    mix = RewardMix({"a": RewardTerm(nothing), "cost": RewardTerm(Cost(), 0)})
    assert measure({"a": A, "cost": -A}, mix)["reward/a/agrees_with/cost"] == 1.0
    assert measure({"a": A, "cost": A}, mix)["reward/a/agrees_with/cost"] == 0.0


def test_what_has_no_pairs_is_left_out():
    flat = torch.ones(8)
    metrics = measure({"a": flat, "b": B}, RewardMix({"a": RewardTerm(nothing), "b": RewardTerm(nothing, 0)}))
    assert metrics["reward/ties"] == 1
    assert not [name for name in metrics if "agrees_with" in name or "share" in name]


def test_two_devices_give_the_numbers_of_one():
    """Each adds its rows to zeros, and the sum over devices is what one has: to the bit."""
    scores = {"a": A, "b": B}
    own = []
    for pairs in (range(0, 1), range(1, 4)):
        gather(rollout(scores, pairs), 4, lambda sums: (own.append(sums), sums)[1])
    summed = gather(rollout(scores, range(0, 1)), 4, lambda sums: own[0] + own[1])
    alone = gather(rollout(scores), 4, lambda sums: sums)
    for ours, theirs in zip((*summed.scores.values(), summed.distance), (A, B, alone.distance), strict=True):
        assert torch.equal(ours, theirs)
    assert own_rows(range(1, 4)).tolist() == list(range(2, 8))
