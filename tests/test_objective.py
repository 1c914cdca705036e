import pytest
import torch

from lightning_fdfo.objective import half_differences, normalize_difference, velocity_divergence, velocity_objective
from lightning_fdfo.sampling import sample_pairs
from lightning_fdfo.schedules import churn_schedule, uniform_sigmas


def test_half_differences_of_a_pair_sum_to_zero():
    values = torch.randn(8, 3, 2)
    differences = half_differences(values)
    assert torch.equal(differences[0::2], -differences[1::2])
    torch.testing.assert_close(2 * differences[0], values[0] - values[1])


def test_half_differences_need_pairs():
    with pytest.raises(ValueError, match="3 rows"):
        half_differences(torch.zeros(3))


def test_offsets_change_nothing():
    rewards, ends = torch.randn(6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(half_differences(rewards + 5), half_differences(rewards))
    torch.testing.assert_close(
        normalize_difference(half_differences(ends - 3)), normalize_difference(half_differences(ends))
    )


def test_direction_normalizations():
    difference = torch.randn(4, 2, 3)
    torch.testing.assert_close(
        normalize_difference(difference, "root_mean_square", eps=0).pow(2).mean((1, 2)), torch.ones(4)
    )
    torch.testing.assert_close(
        (normalize_difference(difference, "mean_square", eps=0) * difference).mean((1, 2)), torch.ones(4)
    )
    assert torch.equal(normalize_difference(torch.zeros(2, 3)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'max'"):
        normalize_difference(difference, "max")


def test_on_policy_the_gradient_is_two_over_n_times_reward_difference_times_direction():
    old, aim, reward = torch.randn(5, 2, 3), torch.randn(5, 2, 3), torch.randn(5)
    velocity = old.clone().requires_grad_()
    loss, ratio = velocity_objective(velocity, old, aim, reward)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    assert torch.equal(ratio, torch.ones(5))
    torch.testing.assert_close(gradient, 2 / 6 * reward[:, None, None] * aim)


@pytest.mark.parametrize("reward", [0.7, -0.7])
def test_the_best_ratio_is_one_plus_or_minus_the_clip_range(reward):
    """Along one line of velocities the loss is least where the ratio has gone clip_range from 1, to the better side."""
    aim = torch.ones(1, 4)
    steps = torch.linspace(-0.2, 0.2, 4001)
    loss, ratio = velocity_objective(
        steps[:, None] * aim, torch.zeros(4001, 4), aim.expand(4001, 4), torch.full((4001,), reward), clip_range=0.1
    )
    assert ratio[loss.argmin()].item() == pytest.approx(1 + 0.1 * (1 if reward > 0 else -1), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_pairs_keep_their_digits(dtype):
    """At a gap of 0.01 the expanded log-ratio agrees with float64; the form with squared distances would not."""
    torch.manual_seed(0)
    difference = 0.01 * torch.randn(8, 64)
    aim, old = normalize_difference(difference), torch.randn(8, 64).to(dtype)
    new = (old.float() + 1e-3 * torch.randn(8, 64)).to(dtype)
    delta, wide_aim = new.double() - old.double(), aim.double()
    exact = (-(delta**2).mean(1) - 2 * (delta * wide_aim).mean(1)).exp()
    ratio = velocity_objective(new, old, aim, torch.ones(8)).ratio
    torch.testing.assert_close(ratio.double(), exact, rtol=1e-5, atol=0)


def test_a_step_moves_the_image_toward_the_better_one():
    ends, rewards = torch.randn(2, 6), torch.tensor([1.0, 0.0])
    differences = half_differences(ends)
    old = torch.randn(2, 6)
    velocity = old.clone().requires_grad_()
    velocity_objective(
        velocity, old, normalize_difference(differences), half_differences(rewards)
    ).loss.sum().backward()
    change_of_image = velocity.grad  # x0 = x - sigma * v, and v moves by minus the gradient
    assert (change_of_image @ (ends[0] - ends[1]) > 0).all()


def test_the_secant_estimate_of_a_linear_reward_through_a_linear_flow_is_j_jt_gradient():
    """E[half difference of R * half difference of x0] = (1 - rho^2) / 2 * J J^T grad R; 400 000 pairs, seed 0, 2 %.

    The flow v = A x is linear, so x0 = J z, with J found by sending the unit vectors through the sampler.
    """
    generator = torch.Generator().manual_seed(0)
    size, num_pairs, churn = 4, 400_000, 0.3
    matrix = torch.randn(size, size, generator=generator) / 2
    gradient = torch.randn(size, generator=generator)
    flow = lambda x, sigma: x @ matrix.T  # noqa: E731
    sigmas, churns = uniform_sigmas(8), churn_schedule(0.0, 8, initial_churn=churn)
    unit = sample_pairs(flow, torch.eye(size), sigmas, 0.0, lambda k: torch.zeros(2 * size, size))
    jacobian = unit.latents[0::2, -1].T
    ends = sample_pairs(
        flow,
        torch.randn(num_pairs, size, generator=generator),
        sigmas,
        churns,
        lambda k: torch.randn(2 * num_pairs, size, generator=generator),
    ).latents[:, -1]
    estimate = (half_differences(ends @ gradient)[:, None] * half_differences(ends)).mean(0)
    exact = (1 - 1 / (1 + churn) ** 2) / 2 * jacobian @ jacobian.T @ gradient
    assert (estimate - exact).norm() / exact.norm() < 0.02


def test_divergence_is_the_mean_square():
    torch.testing.assert_close(velocity_divergence(torch.ones(2, 3, 4), torch.zeros(2, 3, 4)), torch.ones(2))


def test_divergence_refuses_shapes_that_broadcasting_would_hide():
    with pytest.raises(ValueError, match=r"got velocity \[3, 2\] and base_velocity \[3, 1\]"):
        velocity_divergence(torch.zeros(3, 2), torch.zeros(3, 1))


@pytest.mark.parametrize("name", ["old_velocity", "direction", "reward_difference"])
def test_shapes_that_broadcasting_would_hide_are_refused(name):
    """[B, 1] differences against [B] ratios would give a loss of [B, B]."""
    given = {"velocity": torch.zeros(3, 2), "old_velocity": torch.zeros(3, 2), "direction": torch.zeros(3, 2)}
    given |= {"reward_difference": torch.zeros(3)} | {name: torch.zeros(3, 1)}
    with pytest.raises(ValueError, match=rf"expected velocity, .* got .*{name} \[3, 1\]"):
        velocity_objective(**given)
