import pytest
import torch

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.schedules import (
    AdaptiveChurn,
    ChurnSchedule,
    Interval,
    Prior,
    churn_schedule,
    churns_on,
    uniform_sigmas,
)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 7, 40])
def test_grids_fall_from_1_to_0(num_steps, shift):
    sigmas = uniform_sigmas(num_steps, shift=shift)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_churn_is_the_start_the_steps_and_a_zero():
    assert torch.equal(churn_schedule(0.5, 4), torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0]))
    assert torch.equal(churn_schedule(0.5, 1, initial_churn=0.0), torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize("arguments", [(-0.1, 4, None), (0.1, 0, None), (0.1, 4, -1.0)])
def test_negative_churn_is_refused(arguments):
    churn, num_steps, initial = arguments
    with pytest.raises(ValueError, match="churn >= 0"):
        churn_schedule(churn, num_steps, initial_churn=initial)


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 1.0), (4, 0.0)])
def test_impossible_grids_are_refused(num_steps, shift):
    with pytest.raises(ValueError, match="num_steps >= 1 and shift > 0"):
        uniform_sigmas(num_steps, shift=shift)


def test_a_number_gives_the_same_churn_on_every_grid():
    for steps, initial in ((1, None), (4, None), (4, 0.25)):
        expected = churn_schedule(0.5, steps, initial_churn=initial)
        assert torch.equal(churns_on(uniform_sigmas(steps, shift=3.0), 0.5, initial_churn=initial), expected)


@pytest.mark.parametrize("num_steps", [10, 20, 40])
def test_an_interval_has_both_its_ends_on_any_grid(num_steps):
    """0.7 and 0.3 are not float32 numbers."""
    sigmas = uniform_sigmas(num_steps)
    churns = churns_on(sigmas, Interval(0.5, low=0.3, high=0.7))
    inside = [0.3 - 1e-4 < sigma < 0.7 + 1e-4 for sigma in sigmas.tolist()]
    assert churns.tolist() == [0.5 if one else 0.0 for one in inside]


def test_soft_edges_fall_to_0_over_the_softness():
    churn = Interval(1.0, low=0.4, high=0.6, softness=0.2)
    sigmas = torch.tensor([1.0, 0.8, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0])
    expected = torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0])
    torch.testing.assert_close(churn(sigmas), expected, rtol=0, atol=1e-6)


def test_a_prior_is_largest_at_its_mean_and_0_at_both_ends():
    sigmas = torch.tensor([1.0, 0.9, 1 / (1 + 2.718281828), 0.1, 0.0])
    churns = Prior(0.5, mean=-1.0, std=0.5)(sigmas)
    assert churns[2] == pytest.approx(0.5)
    assert churns[0] == churns[-1] == 0
    assert churns.max() == churns[2]


def test_a_factor_leads_to_the_distance_where_that_grows_as_a_root():
    churn, factor = AdaptiveChurn(0.1, 0.5), 1.0
    for _ in range(10):
        factor = churn.next_factor(factor, distance=(factor * 0.9) ** 0.5)
    assert (factor * 0.9) ** 0.5 == pytest.approx(0.1)


def test_the_factor_ends_at_its_bound_where_no_churn_leads_to_the_distance():
    churn, factor = AdaptiveChurn(0.2, 0.5, max_factor=5.0), 1.0
    for _ in range(10):
        factor = churn.next_factor(factor, distance=0.1)
    assert factor == 5.0


class Whole(ChurnSchedule):
    """A schedule that gives back what it got."""

    def __call__(self, sigmas):
        return sigmas


def test_a_schedule_does_not_share_the_grid():
    sigmas = uniform_sigmas(4)
    churns_on(sigmas, Whole(), initial_churn=0.1)
    assert torch.equal(sigmas, uniform_sigmas(4))


class Negative(ChurnSchedule):
    """A schedule that goes below 0."""

    def __call__(self, sigmas):
        return sigmas - 0.5


class Single(ChurnSchedule):
    """A schedule that gives one number for all."""

    def __call__(self, sigmas):
        return torch.tensor(0.1)


@pytest.mark.parametrize("churn", [Negative(), Single()])
def test_a_schedule_of_ones_own_must_give_a_churn_for_each_level(churn):
    with pytest.raises(ConfigurationError, match=f"expected {type(churn).__name__} to give a finite number >= 0 for"):
        churns_on(uniform_sigmas(4), churn)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Interval(-1.0, 0.2, 0.5),
        lambda: Interval(1.0, 0.5, 0.5),
        lambda: Interval(1.0, 0.5, 0.9, softness=-1),
        lambda: Interval(float("nan"), 0.5, 0.9),
        lambda: Prior(-1.0),
        lambda: Prior(1.0, std=0.0),
        lambda: Prior(1.0, mean=float("inf")),
        lambda: AdaptiveChurn(0.0),
        lambda: AdaptiveChurn(0.1, -1.0),
        lambda: AdaptiveChurn(0.1, max_factor=0.5),
        lambda: AdaptiveChurn(0.1, AdaptiveChurn(0.1)),
    ],
)
def test_schedules_that_cannot_be_are_refused(build):
    with pytest.raises(ConfigurationError, match=r"sampling\.churn: expected an? [A-Z]"):
        build()
