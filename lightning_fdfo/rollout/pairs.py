"""Pairs of an epoch: sampled from noise, decoded to images, and scored.

    conditioning --stream_pairs--> latents, velocities --decode--> images --rewards--> scores

Rewards that run elsewhere than the flow score one batch of pairs while the next one is sampled.

Legend: P pairs on this device, 2P branches, T steps, `...` a latent's own axes.
Everything that is kept lies on the CPU in float32 (velocities: `sampling.store`), and no state between epochs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lightning_fdfo.errors import RewardError
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.watched_velocity import WatchedVelocity
from lightning_fdfo.image_statistics import image_statistics
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.randomness import Stream, branch_normal, generator, stack_normal
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.routing import routes
from lightning_fdfo.reward.scorer import Scoring
from lightning_fdfo.reward.scores import Scores
from lightning_fdfo.rollout.gradients import reward_gradients, without_failures
from lightning_fdfo.rollout.points import PairPoints
from lightning_fdfo.sampling import stream_pairs
from lightning_fdfo.schedules import churns_on
from lightning_fdfo.settings import Sampling


class Rollout(NamedTuple):
    """An epoch's pairs of one device."""

    pairs: Sequence[int]
    """P global pair indices"""
    prompts: Sequence[str]
    """P texts"""
    sigmas: Tensor
    """[T+1]"""
    churns: Tensor
    """[T+1]"""
    points: PairPoints
    """the final latents, and the points that train"""
    conditioning: Conditioning
    """P rows"""
    scores: dict[str, Scores]
    """name of a reward -> its scores of 2P images"""
    statistics: dict[str, Tensor]
    """name of an image statistic -> [2P]"""
    gradients: dict[str, Tensor]
    """name of a reward -> the gradient of its score at the final latents, [2P, ...]"""
    seconds: float
    """from its first step to its last score"""

    @staticmethod
    def join(chunks: Sequence[Rollout], points: PairPoints, conditioning: Conditioning, seconds: float) -> Rollout:
        """Joins the chunks of an epoch, whose points and conditioning are parts of these."""
        return Rollout(
            [pair for chunk in chunks for pair in chunk.pairs],
            [text for chunk in chunks for text in chunk.prompts],
            chunks[0].sigmas,
            chunks[0].churns,
            points,
            conditioning,
            {name: Scores.cat([chunk.scores[name] for chunk in chunks]) for name in chunks[0].scores},
            {name: torch.cat([chunk.statistics[name] for chunk in chunks]) for name in chunks[0].statistics},
            {name: torch.cat([chunk.gradients[name] for chunk in chunks]) for name in chunks[0].gradients},
            seconds,
        )


class StartedRollout:
    """Pairs that are sampled, and are being scored.

    Args:
        rollout: of the pairs, without scores.
        scoring: of both branches' images.
        epoch: the current one.
        begun: when their first step began, in seconds of `time.perf_counter`.
    """

    def __init__(self, rollout: Rollout, scoring: Scoring, epoch: int, begun: float) -> None:
        self._rollout = rollout
        self._scoring = scoring
        self._epoch = epoch
        self._begun = begun

    def result(self) -> Rollout:
        """Waits for the scores; raises RewardError, which names the pair, if a reward failed."""
        with _named(self._rollout.pairs, self._epoch):
            scores = without_failures(self._scoring.result(), self._rollout.gradients)
        return self._rollout._replace(scores=scores, seconds=time.perf_counter() - self._begun)

    def ended_on_error(self) -> AbstractContextManager[None]:
        """See `Scoring.ended_on_error`."""
        return self._scoring.ended_on_error()


@torch.no_grad()
def start_rollout(
    flow: FlowModel,
    rewards: RewardMix,
    prompts: Sequence[Prompt],
    conditioning: Conditioning,
    pairs: Sequence[int],
    points: PairPoints,
    *,
    seed: int,
    epoch: int,
    sampling: Sampling,
    device: torch.device,
    churn_factor: float = 1.0,
    drop: bool = False,
    after: StartedRollout | None = None,
) -> StartedRollout:
    """Samples some pairs of an epoch in one batch, and starts to score them.

    Args:
        flow: the model, loaded.
        rewards: the mixture, set up.
        prompts: one per pair.
        conditioning: of the prompts, a row each, on any device.
        pairs: their global indices in the epoch.
        points: of these pairs, on the CPU; filled here.
        seed: the run's.
        epoch: the current one.
        sampling: settings.
        device: where the model is.
        churn_factor: what the churn is multiplied by, see `AdaptiveChurn`.
        drop: whether a reward's failure leaves an image without a score, with a warning.
        after: pairs that may still be scored while these are sampled; these are scored after them.

    Returns:
        A StartedRollout, whose `result` is the Rollout, on the CPU.

    Raises:
        RewardError: here or in `result`: a reward failed, and `drop` is off; it names the pair.
        DivergenceError: latents or images are not finite; it names pair, prompt and step.
    """
    begun = time.perf_counter()
    per_branch = conditioning.to(device)[[row for row in range(len(pairs)) for _ in range(2)]]
    generators = [generator(Stream.LATENTS, seed, epoch, pair) for pair in pairs]
    names = [f"epoch {epoch}, pair {pair}, prompt {p.text!r}" for pair, p in zip(pairs, prompts, strict=True)]
    sigmas = flow.sigmas(sampling.num_steps, sampling.height, sampling.width)
    churns = churn_factor * churns_on(sigmas, sampling.churn, initial_churn=sampling.initial_churn)
    ends, images = _sample(flow, per_branch, generators, sampling, sigmas, churns, device, names, points)
    rollout = Rollout(
        pairs,
        [prompt.text for prompt in prompts],
        sigmas,
        churns,
        points,
        conditioning.to("cpu"),
        {},
        {name: value.cpu() for name, value in image_statistics(images).items()},
        {},
        0.0,
    )
    if after is not None:
        after.result()
    twice = [prompt for prompt in prompts for _ in range(2)]
    texts, metadata = [prompt.text for prompt in twice], [prompt.metadata for prompt in twice]
    targets = routes(rewards.terms, metadata)
    with _named(pairs, epoch):
        gradients = reward_gradients(flow, rewards, ends, images, twice, targets, epoch=epoch, drop=drop)
        scoring = rewards.start(images, texts, metadata, routes=targets, drop=drop)
    return StartedRollout(rollout._replace(gradients=gradients), scoring, epoch, begun)


def _sample(
    flow: FlowModel,
    conditioning: Conditioning,
    generators: list[Generator],
    sampling: Sampling,
    sigmas: Tensor,
    churns: Tensor,
    device: torch.device,
    names: Sequence[str],
    points: PairPoints,
) -> tuple[Tensor, Tensor]:
    """Both branches' final latents, [2P, ...], and images, [2P, 3, H, W]; fills `points`.

    A pair's generator gives its initial latents first, then the fresh noise of both branches at each step.

    Args:
        flow: the model.
        conditioning: 2P rows, on `device`.
        generators: P, one per pair.
        sampling: settings.
        sigmas: [T+1]
        churns: [T+1]
        device: where the model is.
        names: P, what an error calls the pairs.
        points: of these pairs, on the CPU.
    """
    here = points.on(device)
    shape = flow.latent_shape(sampling.height, sampling.width)
    velocity = WatchedVelocity(lambda x, sigma: flow.velocity(x, sigma, conditioning, sampling.guidance_scale))
    ends = stream_pairs(
        velocity,
        stack_normal(generators, *shape).to(device),
        sigmas,
        churns,
        lambda k: branch_normal(generators, *shape, antithetic=sampling.antithetic).to(device),
        here.record,
    )
    here.ends.copy_(ends)
    points.take(here)
    images = flow.decode(ends)
    velocity.check(ends, images, [name for name in names for _ in range(2)], conditioning)
    return ends, images


@contextmanager
def _named(pairs: Sequence[int], epoch: int) -> Iterator[None]:
    """Names the pair, or the pairs, that a reward failed on."""
    try:
        yield
    except RewardError as error:
        which = f"pair {pairs[error.row // 2]}" if error.row is not None else f"pairs {pairs[0]} to {pairs[-1]}"
        raise RewardError(f"{which} of epoch {epoch}: {error}") from error
