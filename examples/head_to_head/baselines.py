"""Three published ways to learn from rewards, on this package's sampling, rewards and updates.

Each is written from its paper's mathematics, for images x0 of a group (all images of a prompt) and their advantages A:

    AWM        advantage-weighted matching          arXiv 2509.25050
    NFT        DiffusionNFT, negative-aware         arXiv 2509.16117
    FlowGRPO   policy gradient along a random path  arXiv 2505.05470

The first two re-noise the finished images, x = (1 - sigma) * x0 + sigma * noise, and never look at how they were
sampled; the third learns from the steps of its sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.objective import velocity_objective
from lightning_fdfo.randomness import Stream, generator, stack_normal
from lightning_fdfo.rollout.algorithm import Algorithm, Context, Targets, group_advantages
from lightning_fdfo.rollout.pairs import Rollout
from lightning_fdfo.rollout.points import TrajectoryPoints


def renoised(rollout: Rollout, context: Context, advantages: Tensor) -> Targets:
    """Points on straight lines between final latents and fresh noise, at the noise levels that were chosen.

    Their direction is the line's own velocity, noise - x0.
    """
    pairs, number, _ = rollout.points.chosen.shape
    branch, step = rollout.points.chosen.unbind(-1)
    row = 2 * torch.arange(pairs)[:, None] + branch
    ends, sigma = rollout.points.ends[row], rollout.sigmas[step]
    random = [generator(Stream.POINTS, context.seed, context.epoch, 1_000_000 + pair) for pair in rollout.pairs]
    noise = stack_normal(random, *ends.shape[1:])
    level = sigma.reshape(*sigma.shape, *[1] * (ends.ndim - 2))
    latents = (1 - level) * ends + level * noise
    which = torch.arange(pairs).repeat_interleave(number)
    velocity = context.velocity(latents.flatten(0, 1), sigma.flatten(), which).view_as(latents)
    return Targets(latents, sigma, velocity, noise - ends, advantages[context.rows][row])


class AWM(Algorithm):
    """Matches the flow to its own images, weighed by their advantage.

        log_ratio = mean((v_old - target)^2) - mean((v - target)^2)        target = noise - x0
        loss      = -min(A * ratio, A * clip(ratio, 1 - clip_range, 1 + clip_range))

    Args:
        clip_range: > 0; idle with one update an epoch.
    """

    def __init__(self, clip_range: float = 0.2) -> None:
        self.clip_range = clip_range

    def targets(self, rollout: Rollout, context: Context) -> Targets:
        """The re-noised images, and where the rollout's velocity misses their line."""
        found = renoised(rollout, context, group_advantages(context))
        return found._replace(direction=found.velocity - found.direction)

    def loss(self, velocity: Tensor, batch: TrajectoryPoints) -> tuple[Tensor, dict[str, Tensor]]:
        """As above."""
        advantage = batch.reward_difference
        ratio = velocity_objective(velocity, batch.old_velocity, batch.direction, advantage).ratio
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return -torch.minimum(advantage * ratio, advantage * clipped), {"train/ratio": ratio.mean()}


class NFT(Algorithm):
    """Learns from good and from bad images by two implicit velocities, one on each side of the rollout's.

        v_plus  = (1 - beta) * v_old + beta * v          good images, with weight r
        v_minus = (1 + beta) * v_old - beta * v          bad images, with weight 1 - r
        loss    = r * |v_plus - target|^2 + (1 - r) * |v_minus - target|^2
        r       = 1/2 + clip(A / (2 * largest), -1/2, 1/2)

    Each square is that of the image that a velocity predicts, x - sigma * v, over its own mean absolute error. The
    rollout's velocity is to be a slow average of the one that trains: `EMA` with `rollouts: true`.

    Args:
        beta: > 0, how far apart the two lie.
        largest: > 0, the advantage at which an image is all good.
    """

    def __init__(self, beta: float = 1.0, largest: float = 5.0) -> None:
        self.beta = beta
        self.largest = largest

    def targets(self, rollout: Rollout, context: Context) -> Targets:
        """The re-noised images."""
        return renoised(rollout, context, group_advantages(context))

    def loss(self, velocity: Tensor, batch: TrajectoryPoints) -> tuple[Tensor, dict[str, Tensor]]:
        """As above."""
        good = 0.5 + (batch.reward_difference / (2 * self.largest)).clamp(-0.5, 0.5)
        step, sigma = self.beta * (velocity.float() - batch.old_velocity), batch.sigma.clamp(min=1e-3)
        errors = [self._error(batch.old_velocity + way * step - batch.direction, sigma) for way in (1, -1)]
        return good * errors[0] + (1 - good) * errors[1], {"train/good": good.mean()}

    @staticmethod
    def _error(missed: Tensor, sigma: Tensor) -> Tensor:
        """[B], of velocities that miss their target by so much."""
        missed = sigma.reshape(-1, *[1] * (missed.ndim - 1)) * missed
        return (missed**2).flatten(1).mean(dim=1) / missed.detach().abs().flatten(1).mean(dim=1).clamp(min=1e-5)


class FlowGRPO(Algorithm):
    """A policy gradient: each step of a sampler with much churn is a draw from a normal density.

        x_next    = mean(v) + std * noise
        mean(v)   = (1 - next) * (x - sigma * v) + next * rho * (x + (1 - sigma) * v)
        std       = next * sqrt(1 - rho^2)               rho = 1 / (1 + churn), next: the noise level that it lands on
        log_ratio = mean(noise * shift) - mean(shift^2) / 2        shift = (mean(v) - mean(v_old)) / std
        loss      = -min(A * ratio, A * clip(ratio, 1 - clip_range, 1 + clip_range))

    The last step has no noise, and is left out.

    Args:
        clip_range: > 0; idle with one update an epoch.
    """

    def __init__(self, clip_range: float = 1e-3) -> None:
        self.clip_range = clip_range

    def targets(self, rollout: Rollout, context: Context) -> Targets:
        """The trajectories' own points; `direction` is d log_ratio / d v, for one number of a latent."""
        if context.sampling.antithetic:
            raise ConfigurationError("FlowGRPO: expected sampling.antithetic: false, for its noise is drawn again")
        points, sigmas = rollout.points, rollout.sigmas
        branch, step = points.chosen.unbind(-1)
        noise = self._noise(rollout, context, len(sigmas) - 1)[torch.arange(len(step))[:, None], step, branch]
        rho, following = 1 / (1 + rollout.churns[step + 1]), sigmas[step + 1]
        std = following * (1 - rho**2).sqrt()
        slope = following * rho * (1 - sigmas[step]) - (1 - following) * sigmas[step]
        per_step = torch.where(std > 0, slope / std.clamp(min=1e-12), 0.0)  # of the last step: 0
        direction = per_step.reshape(*step.shape, *[1] * (noise.ndim - 2)) * noise
        row = 2 * torch.arange(len(step))[:, None] + branch
        advantage = group_advantages(context)[context.rows][row]
        self._slopes = {float(s): float(p) for s, p in zip(sigmas[step].flatten(), per_step.flatten(), strict=True)}
        return Targets(points.latents, sigmas[step], points.velocities.float(), direction, advantage)

    @staticmethod
    def _noise(rollout: Rollout, context: Context, num_steps: int) -> Tensor:
        """[P, T, 2, ...]: the fresh noise of each step, drawn again; that of the last step, which has none, is 0."""
        shape = rollout.points.ends.shape[1:]
        random = [generator(Stream.LATENTS, context.seed, context.epoch, pair) for pair in rollout.pairs]
        for draw in ((), (2,)):  # initial latents, and their own churn
            stack_normal(random, *draw, *shape)
        fresh = [stack_normal(random, 2, *shape) for _ in range(num_steps - 1)]
        return torch.stack([*fresh, torch.zeros_like(fresh[0])], dim=1)

    def loss(self, velocity: Tensor, batch: TrajectoryPoints) -> tuple[Tensor, dict[str, Tensor]]:
        """As above."""
        slope = torch.tensor([self._slopes[float(sigma)] for sigma in batch.sigma], device=velocity.device)
        delta, advantage = velocity.float() - batch.old_velocity, batch.reward_difference
        pull, length = ((delta * batch.direction).flatten(1).mean(dim=1), (delta**2).flatten(1).mean(dim=1))
        ratio = (pull - slope**2 * length / 2).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return -torch.minimum(advantage * ratio, advantage * clipped), {"train/ratio": ratio.mean()}
