"""FDFO in the plane, where all can be seen: python examples/toy_2d/toy_2d.py [PICTURE].

The base model is a mixture of five Gaussians, whose velocity is known in closed form; nothing is pretrained. The reward
is highest at one of them. What trains is a small network that is added to the velocity and starts at zero, as a
LoRA does.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_fdfo.objective import half_differences, normalize_difference, velocity_objective
from lightning_fdfo.sampling import Trajectories, sample, sample_pairs
from lightning_fdfo.schedules import uniform_sigmas

ANGLES = torch.arange(5) * 2 * math.pi / 5
MEANS = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
"""[K, 2]: the modes, equally likely, on a circle."""
STD = 0.25
"""Of each mode."""
REWARDED = 0
"""Index of the mode that the reward is highest at."""
WIDTH = 2.0
"""Of the reward's hill."""
CHURN = 0.1
SIGMAS = uniform_sigmas(20)


def mixture_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of the mixture, E[noise - x0 | x], in closed form.

    With x = (1 - sigma) * x0 + sigma * noise and x0 from mode k, x is normal, and so are x0 and noise given x:

        p(x | k)        = N((1 - sigma) * m_k, t^2)        t^2 = (1 - sigma)^2 * s^2 + sigma^2
        r_k             = x - (1 - sigma) * m_k
        E[x0 | x, k]    = m_k + (1 - sigma) * s^2 / t^2 * r_k
        E[noise | x, k] = sigma / t^2 * r_k
        v(x)            = sum_k p(k | x) * ((sigma - (1 - sigma) * s^2) / t^2 * r_k - m_k)

    where p(k | x) is softmax_k(-|r_k|^2 / (2 t^2)), m_k are the means, and s is `STD`.

    Args:
        x: [N, 2].
        sigma: in [0, 1]; a 0-d tensor, or [N, 1].

    Returns:
        [N, 2].

    Example:
        >>> mixture_velocity(torch.zeros(1, 2), torch.tensor(1.0)).abs().max() < 1e-6  # the modes' mean is the origin
        tensor(True)
    """
    sigma = sigma.reshape(-1, 1, 1)
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    residual = x[:, None] - (1 - sigma) * MEANS
    weight = (-residual.square().sum(dim=2, keepdim=True) / (2 * variance)).softmax(dim=1)
    return (weight * ((sigma - (1 - sigma) * STD**2) / variance * residual - MEANS)).sum(dim=1)


class PlaneFlow(nn.Module):
    """The mixture's velocity, and a correction that trains; it is zero at first."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.correction = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.correction[0], self.correction[2]):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.correction[4].weight)
        nn.init.zeros_(self.correction[4].bias)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[N, 2] and a 0-d tensor or [N, 1] -> [N, 2]."""
        features = torch.cat([x, sigma.expand(len(x), 1)], dim=1)
        return mixture_velocity(x, sigma) + self.correction(features)


def reward(x: Tensor) -> Tensor:
    """A hill around the rewarded mode, exp(-|x - m|^2 / (2 WIDTH^2)): [N, 2] -> [N]."""
    return (-(x - MEANS[REWARDED]).square().sum(dim=1) / (2 * WIDTH**2)).exp()


def reward_gradient(x: Tensor) -> Tensor:
    """Its gradient, [N, 2] -> [N, 2]; the method never sees it."""
    return reward(x)[:, None] * (MEANS[REWARDED] - x) / WIDTH**2


def share_at_rewarded_mode(x: Tensor) -> float:
    """Share of points [N, 2] whose nearest mode is the rewarded one."""
    return (torch.cdist(x, MEANS).argmin(dim=1) == REWARDED).double().mean().item()


def roll_out(flow: nn.Module, latents: Tensor, generator: torch.Generator) -> tuple[Trajectories, Tensor, Tensor]:
    """Pairs from latents [P, 2]: trajectories, reward differences [2P], directions [2P, 2]."""
    noise = [torch.randn(2 * len(latents), 2, generator=generator) for _ in SIGMAS]
    with torch.no_grad():
        trajectories = sample_pairs(flow, latents, SIGMAS, CHURN, noise.__getitem__)
    ends = trajectories.latents[:, -1]
    return trajectories, half_differences(reward(ends)), normalize_difference(half_differences(ends))


def train(flow: nn.Module, epochs: int = 75, num_pairs: int = 128, seed: int = 0) -> None:
    """One update an epoch, on all points of both branches of all pairs."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=1e-4)
    steps = len(SIGMAS) - 1
    sigma = SIGMAS[:-1].repeat(2 * num_pairs)[:, None]
    for _ in range(epochs):
        latents = torch.randn(num_pairs, 2, generator=generator)
        trajectories, difference, towards = roll_out(flow, latents, generator)
        velocity = flow(trajectories.latents[:, :-1].flatten(0, 1), sigma)
        old = trajectories.velocities.flatten(0, 1)
        every_step = (towards.repeat_interleave(steps, dim=0), difference.repeat_interleave(steps))
        velocity_objective(velocity, old, *every_step).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def secant_gradients(flow: nn.Module, latents: Tensor, pairs_each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What FDFO takes for the reward's gradient, and the gradient.

    A pair tells the slope along one line only. The mean over pairs with differences d in all directions alike is the
    gradient: E[N d d^T / |d|^2] is the identity. So the estimate is the mean of reward_difference * direction over
    many pairs from the same initial latents, and the gradient the mean of the true one at their ends.

    Args:
        flow: as above.
        latents: [M, 2], initial latents.
        pairs_each: pairs from each.
        seed: of the churn's noise.

    Returns:
        Estimates [M, 2] and gradients [M, 2].
    """
    generator = torch.Generator().manual_seed(seed)
    trajectories, difference, towards = roll_out(flow, latents.repeat_interleave(pairs_each, dim=0), generator)
    estimate = difference[:, None] * towards
    truth = reward_gradient(trajectories.latents[:, -1])
    return tuple(values.reshape(len(latents), -1, 2).mean(dim=1) for values in (estimate, truth))


def pull(flow: nn.Module, latents: Tensor, pairs_each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Where the trajectories from a few initial latents go, and where the objective pulls them.

    Descent changes the velocity at each step by minus the objective's gradient. The state runs against the velocity,
    from sigma = 1 to 0, so the image is pulled along plus the gradient.

    Args:
        flow: as above.
        latents: [M, 2], initial latents.
        pairs_each: pairs from each, whose gradients are averaged.
        seed: of the churn's noise.

    Returns:
        Paths without churn [M, T+1, 2], and pulls [M, T, 2], one a step.
    """
    generator = torch.Generator().manual_seed(seed)
    trajectories, difference, towards = roll_out(flow, latents.repeat_interleave(pairs_each, dim=0), generator)
    pulls = []
    for old in trajectories.velocities.unbind(dim=1):
        velocity = old.clone().requires_grad_()
        loss = velocity_objective(velocity, old, towards, difference).loss.sum()
        (gradient,) = torch.autograd.grad(loss, velocity)
        pulls.append(gradient.reshape(len(latents), -1, 2).mean(dim=1))
    with torch.no_grad():
        paths = sample_pairs(flow, latents, SIGMAS, 0.0, lambda _: torch.zeros(2 * len(latents), 2)).latents[::2]
    return paths, torch.stack(pulls, dim=1)


def picture(before: Tensor, after: Tensor, paths: Tensor, pulls: Tensor) -> Figure:
    """Samples before [N, 2], the pull on some paths [M, T+1, 2] and [M, T, 2], samples after [N, 2]."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    grid = torch.linspace(-3.2, 3.2, 161)
    plane = torch.cartesian_prod(grid, grid)
    hill = reward(plane).reshape(161, 161).T
    for axes in panels:
        axes.contour(grid, grid, hill, levels=[0.1, 0.3, 0.5, 0.7, 0.9], colors="0.75", linewidths=0.8)
        axes.plot(*MEANS[REWARDED], marker="*", markersize=14, color="white", markeredgecolor="black", zorder=4)
        axes.set(aspect="equal", xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xticks=[], yticks=[])
    for axes, samples, name in ((panels[0], before, "before"), (panels[2], after, "after")):
        axes.scatter(*samples.T, s=5, color="#1f4e9c", alpha=0.5, linewidths=0)
        axes.set_title(f"{name}: {share_at_rewarded_mode(samples):.0%} at the rewarded mode", fontsize=10)
    axes = panels[1]
    axes.set_title("the pull along eight paths", fontsize=10)
    for path, arrows in zip(paths, pulls, strict=True):
        axes.plot(*path.T, color="0.55", linewidth=1, zorder=2)
        axes.plot(*path[0], marker="o", markersize=4, color="white", markeredgecolor="0.4", zorder=3)
        axes.plot(*path[-1], marker="o", markersize=5, color="#1f4e9c", zorder=3)
        places, arrows = path[3:-1:4].T, arrows[3::4].T
        axes.quiver(*places, *arrows, color="#c2410c", angles="xy", scale_units="xy", scale=0.5, width=0.006, zorder=5)
    return figure


def main() -> None:
    """Trains, prints the numbers, draws the picture."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/toy_2d.png")
    latents = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    flow = PlaneFlow()
    with torch.no_grad():
        before = sample(flow, latents, SIGMAS)
    estimate, gradient = secant_gradients(flow, latents[:200], pairs_each=256)
    cosine = torch.cosine_similarity(estimate, gradient, dim=1)
    print(f"cosine of secant estimate and gradient: mean {cosine.mean():.3f}, smallest {cosine.min():.3f}")
    angles = torch.arange(8) * 2 * math.pi / 8 + 0.2
    paths, pulls = pull(flow, 1.5 * torch.stack([angles.cos(), angles.sin()], dim=1), pairs_each=256)
    train(flow)
    with torch.no_grad():
        after = sample(flow, latents, SIGMAS)
    for name, samples in (("before", before), ("after", after)):
        share, mean = share_at_rewarded_mode(samples), reward(samples).mean()
        print(f"{name}: {100 * share:.0f} % at the rewarded mode, mean reward {mean:.2f}")
    picture(before, after, paths, pulls).savefig(target, dpi=120)
    print(f"{target} is drawn")


if __name__ == "__main__":
    main()
