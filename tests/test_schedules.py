import pytest
import torch

from lightning_fdfo.schedules import churn_schedule, uniform_sigmas


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
