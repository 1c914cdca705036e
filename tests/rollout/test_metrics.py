"""The epoch's numbers against a few lines of arithmetic."""

import pytest
import scipy.stats
import torch

from lightning_fdfo import Reward, RewardMix
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.objective import half_differences
from lightning_fdfo.reward.scores import Scores
from lightning_fdfo.reward.term import Gate, RewardTerm
from lightning_fdfo.rollout.metrics import rollout_metrics
from lightning_fdfo.rollout.pairs import Rollout
from lightning_fdfo.rollout.points import PairPoints
from lightning_fdfo.rollout.scores import gather, own_rows, weigh

# four pairs: rows 2i and 2i + 1
A = torch.tensor([3.0, 1.0, 0.0, 4.0, 5.0, 5.0, 2.0, 0.0])
B = torch.tensor([10.0, 30.0, 0.0, 20.0, 7.0, 1.0, 4.0, 4.0])


class Cost(Reward):
    higher_is_better = False

    def __call__(self, images, prompts, metadata):
        raise NotImplementedError


def with_masks(values, multiplier):
    """NaN stands for what there is not: a score, or a route to the reward."""
    scored, routed = ~values.isnan(), ~multiplier.isnan()
    return Scores(values.nan_to_num(0.0), scored, routed, multiplier.nan_to_num(0.0))


def rollout(scores, pairs=range(4), routes=None):
    rows = slice(2 * pairs.start, 2 * pairs.stop)
    ends = torch.zeros(8, 1, 2, 2)
    ends[::2] = 1.0  # half differences of 1/2 everywhere
    empty = torch.zeros(len(pairs), 0, 1, 2, 2)
    points = PairPoints(torch.zeros(len(pairs), 0, 2, dtype=torch.long), empty, empty, ends[rows])
    routes = {name: torch.ones(8) for name in scores} | (routes or {})
    made = {name: with_masks(values, routes[name]).select(rows) for name, values in scores.items()}
    statistics = {"brightness": torch.arange(8.0)[rows]}
    sigmas = torch.tensor([1.0, 0.0])
    return Rollout(pairs, "abcd", sigmas, sigmas, points, Conditioning({}), made, statistics, {}, seconds=2.0)


def gathered(rollout, num_pairs, all_sum=lambda sums: sums):
    return gather(rollout, half_differences(rollout.points.ends), num_pairs, all_sum)


def judged(scores, mix, routes=None, epoch=0):
    return weigh(gathered(rollout(scores, routes=routes), 4), list("abcd"), mix, epoch)


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
    assert metrics["image/brightness"] == 3.5


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


def spearman(ours, theirs):
    """SciPy's, of half differences seen from both branches."""
    ours, theirs = (half_differences(values).numpy() for values in (ours, theirs))
    return scipy.stats.spearmanr(ours, theirs).statistic


def test_rank_correlation_is_scipys():
    random = torch.Generator().manual_seed(0)
    for ours, theirs in ((A, B), (torch.randn(8, generator=random), torch.randn(8, generator=random))):
        mix = RewardMix({"a": RewardTerm(nothing), "b": RewardTerm(nothing, 0), "cost": RewardTerm(Cost(), 0)})
        metrics = measure({"a": ours, "b": theirs, "cost": theirs}, mix)
        expected = spearman(ours, theirs)
        assert metrics["reward/a/rank_correlation/b"] == pytest.approx(expected, abs=2e-6)
        assert metrics["reward/a/rank_correlation/cost"] == pytest.approx(-expected, abs=2e-6)
        assert metrics["reward/b/rank_correlation/cost"] == pytest.approx(-1, abs=2e-6)


def test_rank_correlation_does_not_ask_which_branch_comes_first():
    mix = RewardMix({"a": RewardTerm(nothing), "b": RewardTerm(nothing)})
    turned = [1, 0, 2, 3, 5, 4, 6, 7]
    one, other = measure({"a": A, "b": B}, mix), measure({"a": A[turned], "b": B[turned]}, mix)
    assert one["reward/a/rank_correlation/b"] == other["reward/a/rank_correlation/b"]


NAN = torch.nan


def test_what_was_not_scored_is_in_no_number():
    """The third pair does not go to a, the first does not go to b."""
    a, b = A.clone(), B.clone()
    a[4:6], b[:2] = NAN, NAN
    routes = {"a": torch.ones(8), "b": torch.full((8,), 2.0)}
    routes["a"][4:6], routes["b"][:2] = NAN, NAN
    mix = RewardMix({"a": RewardTerm(nothing, 2.0, "std"), "b": RewardTerm(nothing, 0.1)})
    metrics = measure({"a": a, "b": b}, mix, routes)
    assert metrics["reward/a/mean"] == pytest.approx((3 + 1 + 0 + 4 + 2 + 0) / 6)
    assert metrics["reward/a/std"] == pytest.approx(a.double().numpy()[[0, 1, 2, 3, 6, 7]].std())
    assert metrics["reward/b/difference"] == pytest.approx((10 + 3 + 0) / 3)
    assert metrics["reward/a/ties"] == 0
    assert metrics["reward/b/ties"] == pytest.approx(1 / 3)
    std = ((1 + 4 + 1) / 3) ** 0.5
    assert mix.running["a"].std == pytest.approx(std)
    parts = {"a": [2 / std, -4 / std, 0, 2 / std], "b": [0, -2, 0.6, 0]}
    size = sum(abs(one + two) for one, two in zip(*parts.values(), strict=True))
    assert metrics["reward/difference"] == pytest.approx(size / 4)
    assert metrics["reward/a/share"] == pytest.approx(8 / std / size)
    assert metrics["reward/b/share"] == pytest.approx(2.6 / size)
    assert metrics["reward/a/agrees_with/b"] == 1.0  # in the second pair; in the fourth b is a tie
    expected = spearman(torch.cat([A[2:4], A[6:]]), torch.cat([B[2:4], B[6:]]))
    assert metrics["reward/a/rank_correlation/b"] == pytest.approx(expected, abs=2e-6)
    assert all(value == value for value in metrics.values())


def test_terms_that_nobody_was_sent_to_or_that_are_always_a_tie_leave_no_numbers_behind():
    scores = {"a": A, "flat": torch.ones(8), "idle": torch.full((8,), NAN)}
    mix = RewardMix({"a": RewardTerm(nothing), "flat": RewardTerm(nothing), "idle": RewardTerm(nothing, 1.0, "std")})
    metrics = measure(scores, mix, {"idle": torch.full((8,), NAN)})
    assert not [name for name in metrics if "idle" in name]
    assert not [name for name in metrics if "rank_correlation" in name]
    assert metrics["reward/a/share"] == 1.0


def test_one_pair_has_no_rank_correlation():
    mix = RewardMix({"a": RewardTerm(nothing), "b": RewardTerm(nothing)})
    one = weigh(gathered(rollout({"a": A, "b": B}, range(0, 1)), 1), ["a"], mix, 0)
    metrics = rollout_metrics(one, mix, 0)
    assert metrics["reward/a/agrees_with/b"] == 0.0
    assert "reward/a/rank_correlation/b" not in metrics


def test_the_share_of_pairs_that_pass_a_gate():
    gate = Gate("a", above=0.5)  # the first and the third pair
    mix = RewardMix({"a": RewardTerm(nothing, 0), "b": RewardTerm(nothing, gate=gate), "c": RewardTerm(nothing, 0)})
    routes = {"b": torch.ones(8)}
    b = B.clone()
    b[6:], routes["b"][6:] = NAN, NAN
    metrics = measure({"a": A, "b": b, "c": B}, mix, routes)
    assert metrics["reward/b/gated"] == pytest.approx(2 / 3)
    assert "reward/a/gated" not in metrics
    assert metrics["reward/difference"] == pytest.approx((10 + 3) / 4)
    assert metrics["reward/ties"] == pytest.approx(2 / 4)


def test_shares_follow_the_schedule():
    mix = RewardMix({"a": RewardTerm(nothing, {0: 1, 1: 0}), "b": RewardTerm(nothing, {0: 0, 1: 1})})
    for epoch, (deciding, silent) in enumerate([("a", "b"), ("b", "a")]):
        metrics = measure({"a": A, "b": B}, mix, epoch=epoch)
        assert metrics[f"reward/{deciding}/share"] == 1.0
        assert f"reward/{silent}/share" not in metrics


def test_dropped_pairs_are_in_no_number():
    """A reward failed on the fourth pair's first branch: the others' numbers alone are left."""
    a = A.clone()
    a[6] = NAN
    mix = RewardMix({"a": RewardTerm(nothing, 2.0, "std"), "b": RewardTerm(nothing, 0.1)})
    kept = judged({"a": a, "b": B}, mix)
    assert kept.kept.tolist() == [True, True, True, False]
    assert kept.difference[6:].tolist() == [0, 0]
    other = RewardMix({"a": RewardTerm(nothing, 2.0, "std"), "b": RewardTerm(nothing, 0.1)})
    three = weigh(gathered(rollout({"a": A, "b": B}, range(0, 3)), 3), list("abc"), other, 0)
    assert rollout_metrics(kept, mix, 0) == rollout_metrics(three, other, 0)
    assert torch.equal(kept.difference[:6], three.difference)


def test_two_devices_give_the_numbers_of_one():
    """Each adds its rows to zeros, and the sum over devices is what one has: to the bit."""
    scores = {"a": A, "b": B}
    own = []
    for pairs in (range(0, 1), range(1, 4)):
        gathered(rollout(scores, pairs), 4, lambda sums: (own.append(sums), sums)[1])
    summed = gathered(rollout(scores, range(0, 1)), 4, lambda sums: own[0] + own[1])
    alone = gathered(rollout(scores), 4)
    values = [one.values for one in summed.scores.values()]
    for ours, theirs in zip((*values, summed.distance), (A, B, alone.distance), strict=True):
        assert torch.equal(ours, theirs)
    assert own_rows(range(1, 4)).tolist() == list(range(2, 8))
