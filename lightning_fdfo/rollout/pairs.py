"""Rollouts: sample pairs and score them; and, for validation, paint prompts without churn.

    prompts --encode--> conditioning --sample_pairs--> latents, velocities --decode--> images --rewards--> Rollout

Legend: P pairs on this device, 2P branches, T steps, `...` a latent's own axes.
Everything at rest lies on the CPU in float32. Nothing here keeps state between epochs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.errors import RewardError
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.watched_velocity import WatchedVelocity
from lightning_fdfo.image_statistics import image_statistics
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.randomness import Stream, generator, stack_normal
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.routing import routes
from lightning_fdfo.sampling import Trajectories, sample_pairs
from lightning_fdfo.schedules import churn_schedule
from lightning_fdfo.settings import Sampling


class Rollout(NamedTuple):
    """An epoch's pairs of one device."""

    pairs: Sequence[int]
    """P global pair indices"""
    prompts: Sequence[str]
    """P texts"""
    sigmas: Tensor
    """[T+1]"""
    trajectories: Trajectories
    """latents [2P, T+1, ...] and velocities [2P, T, ...]"""
    conditioning: Conditioning
    """P rows"""
    scores: dict[str, Tensor]
    """name of a reward -> [2P], float64, unweighted; NaN where it was not to score, or failed"""
    routes: dict[str, Tensor]
    """name of a reward -> [2P], how much it counts for the prompt; NaN where it was not to score"""
    statistics: dict[str, Tensor]
    """name of an image statistic -> [2P]"""
    seconds: float
    """time that it took"""

    @staticmethod
    def cat(parts: Sequence[Rollout]) -> Rollout:
        """Joins the chunks of an epoch."""
        return Rollout(
            [pair for part in parts for pair in part.pairs],
            [text for part in parts for text in part.prompts],
            parts[0].sigmas,
            Trajectories(
                torch.cat([part.trajectories.latents for part in parts]),
                torch.cat([part.trajectories.velocities for part in parts]),
            ),
            Conditioning.cat([part.conditioning for part in parts]),
            {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
            {name: torch.cat([part.routes[name] for part in parts]) for name in parts[0].routes},
            {name: torch.cat([part.statistics[name] for part in parts]) for name in parts[0].statistics},
            sum(part.seconds for part in parts),
        )


@torch.no_grad()
def roll_out(
    flow: FlowModel,
    rewards: RewardMix,
    prompts: Sequence[Prompt],
    conditioning: Conditioning,
    pairs: Sequence[int],
    *,
    seed: int,
    epoch: int,
    sampling: Sampling,
    device: torch.device,
    drop: bool = False,
) -> Rollout:
    """Samples and scores some pairs of an epoch in one batch.

    Args:
        flow: the model, loaded.
        rewards: the mixture, set up.
        prompts: one a pair.
        conditioning: of the prompts, a row each, on any device.
        pairs: their global indices in the epoch.
        seed: the run's.
        epoch: the current one.
        sampling: settings.
        device: where the model is.
        drop: whether a reward's failure is marked by NaN.

    Returns:
        A Rollout, on the CPU.

    Raises:
        RewardError: a reward failed, and `drop` is off; it names the pair.
        DivergenceError: latents or images are not finite; it names pair, prompt and step.
    """
    start = time.perf_counter()
    generators = [generator(Stream.LATENTS, seed, epoch, pair) for pair in pairs]
    shape = flow.latent_shape(sampling.height, sampling.width)
    conditioning = conditioning.to(device)
    per_branch = conditioning[[row for row in range(len(pairs)) for _ in range(2)]]
    sigmas = flow.sigmas(sampling.num_steps, sampling.height, sampling.width)

    velocity = WatchedVelocity(lambda x, sigma: flow.velocity(x, sigma, per_branch, sampling.guidance_scale))
    latents = stack_normal(generators, *shape).to(device)
    trajectories = sample_pairs(
        velocity,
        latents,
        sigmas,
        churn_schedule(sampling.churn, sampling.num_steps, initial_churn=sampling.initial_churn),
        lambda k: stack_normal(generators, 2, *shape).flatten(0, 1).to(device),
    )
    images = flow.decode(trajectories.latents[:, -1])
    twice = [prompt for prompt in prompts for _ in range(2)]
    texts, metadata = [prompt.text for prompt in twice], [prompt.metadata for prompt in twice]
    names = [f"epoch {epoch}, pair {pairs[row // 2]}, prompt {text!r}" for row, text in enumerate(texts)]
    velocity.check(trajectories.latents[:, -1], images, names, per_branch)
    to = routes(rewards.terms, metadata)
    try:
        scores = rewards(images, texts, metadata, drop, to)
    except RewardError as error:
        which = f"pair {pairs[error.row // 2]}" if error.row is not None else f"pairs {pairs[0]} to {pairs[-1]}"
        raise RewardError(f"{which} of epoch {epoch}: {error}") from error
    at_rest = Trajectories(trajectories.latents.cpu(), trajectories.velocities.cpu())
    return Rollout(
        pairs,
        [prompt.text for prompt in prompts],
        sigmas,
        at_rest,
        conditioning.to("cpu"),
        scores,
        to,
        {name: value.cpu() for name, value in image_statistics(images).items()},
        time.perf_counter() - start,
    )
