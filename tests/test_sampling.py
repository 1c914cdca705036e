import itertools
import math

import pytest
import torch

from lightning_fdfo.objective import half_differences
from lightning_fdfo.sampling import churn_prior, churn_step, sample, sample_pairs
from lightning_fdfo.schedules import uniform_sigmas

CHURNS = [0.0, 0.0025, 0.05, 1.0]


MEAN, DEVIATION = 1.5, 0.5


def gaussian_velocity(x, sigma):
    """The exact velocity that carries N(0, 1) at sigma = 1 to N(MEAN, DEVIATION^2) at sigma = 0, number by number."""
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    slope = (sigma - (1 - sigma) * DEVIATION**2) / variance
    return slope * (x - (1 - sigma) * MEAN) - MEAN


def test_without_churn_a_step_is_eulers_to_the_bit():
    x, v, noise = torch.randn(3, 5, 4, 4)
    sigma, sigma_next = torch.tensor(0.7), torch.tensor(0.4)
    assert torch.equal(churn_step(x, v, sigma, sigma_next, 0.0, noise), x + (sigma_next - sigma) * v)
    assert torch.equal(churn_prior(x, 0.0, noise), x)


@pytest.mark.parametrize("churn", CHURNS)
def test_a_step_mixes_noise_on_the_flows_path(churn):
    """float64: from a state on the path, the next one is on the path with rho * old + sqrt(1 - rho^2) * fresh noise."""
    x0, old, fresh = torch.randn(3, 6, 8, dtype=torch.float64)
    sigma, sigma_next = 0.8, 0.3
    state = (1 - sigma) * x0 + sigma * old
    rho = 1 / (1 + churn)
    mixed = rho * old + math.sqrt(1 - rho**2) * fresh
    expected = (1 - sigma_next) * x0 + sigma_next * mixed
    torch.testing.assert_close(churn_step(state, old - x0, sigma, sigma_next, churn, fresh), expected)


@pytest.mark.parametrize("churn", CHURNS)
def test_the_last_step_has_no_churn(churn):
    x, v, noise = torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(churn_step(x, v, 0.2, 0.0, churn, noise), x - 0.2 * v)


def test_settings_can_differ_by_row():
    x, v, noise = torch.randn(3, 2, 3)
    together = churn_step(x, v, torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1]), torch.tensor([0.0, 0.3]), noise)
    torch.testing.assert_close(together[:1], churn_step(x[:1], v[:1], 0.9, 0.5, 0.0, noise[:1]))
    torch.testing.assert_close(together[1:], churn_step(x[1:], v[1:], 0.5, 0.1, 0.3, noise[1:]))


@pytest.mark.parametrize("churn", CHURNS)
def test_the_churned_prior_is_standard_normal(churn):
    """A million numbers, seed 0: mean 0 and deviation 1 to five standard errors."""
    latents, noise = torch.randn(2, 1_000_000, generator=torch.Generator().manual_seed(0))
    churned = churn_prior(latents, churn, noise)
    assert churned.mean().item() == pytest.approx(0, abs=5e-3)
    assert churned.std().item() == pytest.approx(1, abs=5e-3)


def test_euler_converges_at_order_one():
    """The exact end of x is mean + deviation * x; halving the step halves the error."""
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None].float()
    errors = []
    for num_steps in (16, 32, 64, 128):
        end = sample(gaussian_velocity, start, uniform_sigmas(num_steps))
        errors.append((end - (MEAN + DEVIATION * start)).abs().max().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(1.0, abs=0.1), orders


def test_branches_of_a_pair_are_neighbours_and_share_their_start():
    start = torch.randn(3, 2)
    latents, velocities = sample_pairs(lambda x, s: -x, start, uniform_sigmas(4), 0.0, lambda k: torch.randn(6, 2))
    assert latents.shape == (6, 5, 2)
    assert velocities.shape == (6, 4, 2)
    assert torch.equal(latents[0::2], latents[1::2])
    torch.testing.assert_close(latents[0::2, 0], start)
    torch.testing.assert_close(
        latents[:, -1], sample(lambda x, s: -x, start, uniform_sigmas(4)).repeat_interleave(2, 0)
    )


def test_a_churn_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"churn to be a float or \[3\], got shape \[2\]"):
        sample_pairs(lambda x, s: x, torch.zeros(1, 1), uniform_sigmas(2), torch.zeros(2), lambda k: torch.zeros(2, 1))


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.5], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [2.0, 0.0]])
def test_a_grid_that_does_not_fall_from_1_to_0_is_refused(sigmas):
    with pytest.raises(ValueError, match="fall strictly from 1 to 0"):
        sample(lambda x, s: x, torch.zeros(1, 1), torch.tensor(sigmas))


def mirrored(noise):
    """Independent noise of both branches -> the second's is the first's with the opposite sign."""
    first = noise[::2]
    return torch.stack([first, -first], dim=1).flatten(0, 1)


def ends_of_pairs(num_pairs, size, churn, change, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, noises = (torch.randn(*shape, size, generator=generator) for shape in ((num_pairs,), (9, 2 * num_pairs)))
    found = sample_pairs(gaussian_velocity, latents, uniform_sigmas(8), churn, lambda k: change(noises[k]))
    return found.latents[:, -1]


def test_antithetic_branches_end_where_independent_ones_do():
    """Mean and deviation of each branch's images, to five standard errors of 400,000 numbers."""
    ends = [ends_of_pairs(200_000, 2, 0.5, change) for change in (mirrored, lambda noise: noise)]
    branches = [end[row::2].double() for end in ends for row in (0, 1)]
    for branch in branches[1:]:
        assert branch.mean().item() == pytest.approx(
            branches[0].mean().item(), abs=5 * DEVIATION * 2**0.5 / 400_000**0.5
        )
        assert branch.std().item() == pytest.approx(branches[0].std().item(), abs=5 * DEVIATION / 400_000**0.5)


def test_antithetic_differences_are_central_differences_about_the_path_without_fresh_noise():
    """A linear flow and a quadratic reward: exact for every pair; about independent noise the point is another one."""
    generator = torch.Generator().manual_seed(1)
    linear, curvature = torch.randn(6, generator=generator), torch.randn(6, 6, generator=generator)
    curvature = curvature + curvature.T
    middle = ends_of_pairs(64, 6, 0.5, torch.zeros_like)
    slope = (linear + middle @ curvature).double()
    errors = []
    for change in (mirrored, lambda noise: noise):
        ends = ends_of_pairs(64, 6, 0.5, change).double()
        rewards = ends @ linear.double() + ((ends @ curvature.double()) * ends).sum(1) / 2
        expected = (slope * half_differences(ends)).sum(1)
        errors.append(((half_differences(rewards) - expected).square().mean() / expected.square().mean()).sqrt().item())
    assert errors[0] < 1e-5
    assert errors[1] > 0.1


def test_antithetic_branches_are_further_apart():
    """Their half differences have twice the variance of independent ones."""
    apart = [half_differences(ends_of_pairs(20_000, 2, 0.1, change)).var().item() for change in (mirrored, lambda n: n)]
    assert apart[0] / apart[1] == pytest.approx(2, rel=0.05)
