import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from lightning_fdfo.evaluation.win_rate import WinRates, win_rate, wins


def by_hand(tuned, base):
    """Wins plus half of the ties, by loops."""
    won = 0.0
    for ours, theirs in zip(tuned, base, strict=True):
        won += 1.0 if ours > theirs else 0.5 if ours == theirs else 0.0
    return won / len(tuned)


def test_wins_and_half_of_ties_by_hand():
    random = np.random.default_rng(0)
    tuned, base = random.integers(0, 4, size=(2, 60)).astype(float)
    assert any(ours == theirs for ours, theirs in zip(tuned, base, strict=True))
    prompts = torch.arange(15).repeat_interleave(4)
    found = win_rate(prompts, wins(torch.from_numpy(tuned), torch.from_numpy(base)))
    assert found.rate == pytest.approx(by_hand(tuned, base), abs=1e-12)


def test_the_interval_is_scipys_over_prompts_means():
    """With as many images of each prompt, drawing prompts with their images is drawing their means."""
    won = np.random.default_rng(1).integers(0, 3, size=(20, 4)) / 2
    found = win_rate(torch.arange(20).repeat_interleave(4), torch.from_numpy(won).flatten(), num_resamples=800, seed=3)
    expected = bootstrap(
        (won.mean(axis=1),), np.mean, n_resamples=800, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.low < found.rate < found.high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Prompts win with a probability of their own, mean 0.6, and their four images alike: 300 draws, seed 0."""
    random, covered, naive = np.random.default_rng(0), 0, 0
    prompts = torch.arange(40).repeat_interleave(4)
    for draw in range(300):
        chances = random.beta(1.2, 0.8, size=(40, 1))
        won = torch.from_numpy((random.random((40, 4)) < chances).astype(float)).flatten()
        found = win_rate(prompts, won, confidence=0.9, num_resamples=500, seed=draw)
        covered += found.low <= 0.6 <= found.high
        alone = win_rate(torch.arange(160), won, confidence=0.9, num_resamples=500, seed=draw)
        naive += alone.low <= 0.6 <= alone.high
    assert 0.85 <= covered / 300 <= 0.94
    assert naive < covered - 15, "images of one prompt are not independent"


def test_the_seed_and_nothing_else_draws():
    prompts, won = torch.arange(9), torch.tensor([0, 1, 1, 0.5, 0, 1, 1, 1, 0], dtype=torch.float64)
    torch.manual_seed(0)
    np.random.seed(0)
    first = win_rate(prompts, won, seed=5, num_resamples=50)
    assert win_rate(prompts, won, seed=5, num_resamples=50) == first
    assert win_rate(prompts, won, seed=6, num_resamples=50) != first


def test_nothing_to_compare_and_one_prompt():
    nothing = win_rate(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([False]))
    assert np.isnan(nothing).all()
    alone = win_rate(torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    assert alone.rate == 0.5
    assert np.isnan([alone.low, alone.high]).all()
    assert win_rate(torch.arange(3), torch.full((3,), 0.5)) == (0.5, 0.5, 0.5)


def test_what_failed_on_either_side_is_left_out():
    won = wins(torch.tensor([1.0, 0.0, 3.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 2.0]))
    counted = torch.tensor([True, False, False, True])
    torch.testing.assert_close(won[counted], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert win_rate(torch.tensor([0, 0, 1, 1]), won, counted).rate == 0.5


def test_batches_are_one():
    prompts, generator = torch.arange(8), torch.Generator().manual_seed(0)
    tuned, base = torch.randint(3, (2, 8, 2), generator=generator).float()
    metric = WinRates(num_resamples=100, seed=2)
    for rows in (slice(0, 5), slice(5, 5), slice(5, 8)):
        metric.update(prompts[rows], tuned[rows], base[rows])
    expected = [
        win_rate(prompts, wins(tuned[:, column], base[:, column]), num_resamples=100, seed=2) for column in range(2)
    ]
    assert metric.compute() == expected
