"""The training loader: rolls an epoch out, weighs its scores, and deals its points into batches.

    prompts --encode--> conditioning --start_rollout, batch by batch--> Rollout --weigh_scores--> EpochScores
                                                                           '-------------------------+--> batches

Legend: P pairs on this device, 2P branches, `...` a latent's own axes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor

from lightning_fdfo.errors import RewardError
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.generate import encode_prompts
from lightning_fdfo.objective import Normalization, add_gradient, half_differences, normalize_difference
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.randomness import prompt_rows
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.scores import kept_pairs
from lightning_fdfo.rollout.adaptation import Adaptation
from lightning_fdfo.rollout.algorithm import Algorithm, Context, check_targets, deal_targets
from lightning_fdfo.rollout.metrics import rollout_metrics
from lightning_fdfo.rollout.pairs import Rollout, StartedRollout, start_rollout
from lightning_fdfo.rollout.plan import BatchPlan
from lightning_fdfo.rollout.points import PairPoints, TrajectoryPoints, allocate_points, deal_points
from lightning_fdfo.rollout.run_context import RunContext
from lightning_fdfo.rollout.scores import EpochScores, gather, own_rows, weigh
from lightning_fdfo.schedules import AdaptiveChurn
from lightning_fdfo.settings import FailurePolicy, Objective, Sampling


class RolloutCollector:
    """A sized iterable: each `iter()` rolls out the current epoch, then yields its batches of points.

    Lightning takes it for a plain training loader, so accumulation, precision and resuming are Lightning's own. Nothing
    that an epoch depends on is kept from the one before, but the running deviations in `rewards` and `adaptation`.

    Callbacks are called with `on_rollout_batch_start(trainer, pl_module)` before each batch of pairs, and with
    `on_rollout_end(trainer, pl_module, rollout, scores)` once an epoch is scored: this device's pairs as a `Rollout`,
    the numbers of all devices as `EpochScores`.

    Args:
        flow: the model, loaded before the first epoch.
        rewards: the mixture, set up before the first epoch.
        prompts: the training prompts.
        plan: the epoch's arithmetic.
        sampling: how pairs are sampled.
        context: of the run: its devices, precision, epoch and callbacks.
        seed: the run's.
        normalization: of the direction.
        algorithm: how points learn; None is FDFO.
        adaptation: what the run adapts; None adapts the churn alone.
        pairs_per_prompt: pairs in a row of the same prompt; divides the plan's pairs.
        rollout_batch_size: pairs per forward; sets memory only.
        failures: whether a reward's failure ends the run, and how many pairs may be dropped.
    """

    def __init__(
        self,
        flow: FlowModel,
        rewards: RewardMix,
        prompts: Sequence[Prompt],
        plan: BatchPlan,
        sampling: Sampling,
        context: RunContext,
        *,
        seed: int,
        algorithm: Algorithm | None = None,
        adaptation: Adaptation | None = None,
        pairs_per_prompt: int = 1,
        normalization: Normalization = "mean_square",
        rollout_batch_size: int = 8,
        failures: FailurePolicy = FailurePolicy(),  # noqa: B008 - frozen
    ) -> None:
        self.flow = flow
        self.rewards = rewards
        self.prompts = prompts
        self.plan = plan
        self.sampling = sampling
        self.context = context
        self.seed = seed
        self.algorithm = algorithm
        self.pairs_per_prompt = pairs_per_prompt
        self.adaptation = adaptation or Adaptation(sampling, Objective())
        self.normalization = normalization
        self.rollout_batch_size = rollout_batch_size
        self.failures = failures
        self.scores: EpochScores | None = None
        """Of the last epoch, over all devices."""
        self.metrics: dict[str, float] = {}
        """What is logged of the last epoch, over all devices."""
        self.end = 0.0
        """When the last rollout was scored, in seconds of `time.perf_counter`."""

    def __len__(self) -> int:
        return self.plan.batches_per_epoch

    def __iter__(self) -> Iterator[TrajectoryPoints]:
        rollout, epoch = self.collect(self.context.epoch), self.context.epoch
        batches = self._fdfo(rollout, epoch) if self.algorithm is None else self._other(self.algorithm, rollout, epoch)
        self.end = time.perf_counter()
        pinned = self.context.device.type == "cuda"
        yield from map(TrajectoryPoints.pin_memory, batches) if pinned else batches

    def _fdfo(self, rollout: Rollout, epoch: int) -> Iterator[TrajectoryPoints]:
        """The batches of a rollout whose points learn from the differences of pairs."""
        endpoint_difference = half_differences(rollout.points.ends)
        reward_difference = self.weigh_scores(rollout, endpoint_difference, epoch)
        self.context.announce("on_rollout_end", rollout, self.scores)
        directions = normalize_difference(endpoint_difference, self.normalization)
        if rollout.gradients:
            directions, reward_difference = self._add_gradients(rollout, directions, reward_difference, epoch)
        kept, sigmas, conditioning = rollout.points, rollout.sigmas, rollout.conditioning
        return deal_points(kept, sigmas, conditioning, directions, reward_difference, self.plan)

    def _other(self, algorithm: Algorithm, rollout: Rollout, epoch: int) -> Iterator[TrajectoryPoints]:
        """The batches of a rollout whose points learn what an algorithm says."""
        self.weigh_scores(rollout, half_differences(rollout.points.ends), epoch)
        scores = cast(EpochScores, self.scores)
        totals, rows = self.rewards.total(scores.scores, epoch).values, own_rows(rollout.pairs)
        velocity = partial(self._velocity, rollout.conditioning)
        context = Context(totals, scores.kept_rows, scores.prompts, rows, velocity, self.sampling, self.seed, epoch)
        begun = time.perf_counter()
        targets = algorithm.targets(rollout, context)
        check_targets(type(algorithm).__name__, targets, rollout.points)
        self.metrics["rollout/targets_seconds"] = time.perf_counter() - begun
        self.context.announce("on_rollout_end", rollout, scores)
        kept = scores.kept_rows[rows][::2] * (self.plan.num_pairs / scores.kept.sum())
        return deal_targets(targets, kept, rollout.conditioning, self.plan)

    @torch.no_grad()
    def _velocity(self, conditioning: Conditioning, latents: Tensor, sigma: Tensor, pairs: Tensor) -> Tensor:
        """The flow's velocity at points of this device's pairs, in batches, on the CPU: an `algorithm.Velocity`."""
        found, device = [], self.context.device
        with self.context.precision():
            for start in range(0, len(latents), self.plan.batch_size):
                rows = slice(start, start + self.plan.batch_size)
                own = conditioning[pairs[rows]].to(device)
                velocity = self.flow.velocity(
                    latents[rows].to(device), sigma[rows].to(device), own, self.sampling.guidance_scale
                )
                found.append(velocity.float().cpu())
        return torch.cat(found)

    def prompts_of(self, epoch: int, pairs: range) -> list[Prompt]:
        """The prompts of some of an epoch's pairs, by their global indices."""
        each, epoch_draws = self.pairs_per_prompt, self.plan.num_pairs // self.pairs_per_prompt
        draws = range(pairs.start // each, -(-pairs.stop // each))
        rows = prompt_rows(self.seed, epoch * epoch_draws + draws.start, len(draws), len(self.prompts))
        return [self.prompts[rows[pair // each - draws.start]] for pair in pairs]

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Conditioning of prompts, a row each, on the CPU, in the trainer's precision."""
        with self.context.precision():
            scale, batch_size = self.sampling.guidance_scale, self.rollout_batch_size
            return encode_prompts(self.flow, prompts, scale, batch_size).to("cpu")

    def collect(self, epoch: int) -> Rollout:
        """Rolls out this device's pairs of an epoch: all texts are encoded first, then pairs go batch by batch."""
        count, size = self.plan.pairs_per_device, self.rollout_batch_size
        first = self.context.rank * count
        pairs = range(first, first + count)
        self.rewards.scorer.start_epoch(epoch, pairs, self.plan.num_pairs, self.context.folder)
        prompts = self.prompts_of(epoch, pairs)
        conditioning = self.encode(prompts)
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        points = self._allocate(epoch, pairs)
        begun, started = time.perf_counter(), list[StartedRollout]()
        for rows in self.context.track(batches):
            own, last = slice(rows.start, rows.stop), started[-1] if started else None
            started.append(self._start(epoch, pairs[own], prompts[own], conditioning[rows], points[own], last))
        chunks = [one.result() for one in started]
        return Rollout.join(chunks, points, conditioning, time.perf_counter() - begun)

    def _allocate(self, epoch: int, pairs: Sequence[int]) -> PairPoints:
        """Memory for what is kept of an epoch's pairs."""
        sampling = self.sampling
        return allocate_points(
            pairs,
            sampling.num_steps,
            self.plan.points_per_pair,
            self.flow.latent_shape(sampling.height, sampling.width),
            seed=self.seed,
            epoch=epoch,
            store=sampling.store_dtype,
            pinned=self.context.device.type == "cuda",
        )

    def _start(
        self,
        epoch: int,
        pairs: Sequence[int],
        prompts: Sequence[Prompt],
        conditioning: Conditioning,
        points: PairPoints,
        last: StartedRollout | None,
    ) -> StartedRollout:
        """Samples one batch of pairs, while the last one is scored."""
        with nullcontext() if last is None else last.ended_on_error():
            self.context.announce("on_rollout_batch_start")
            with self.context.precision():
                return start_rollout(
                    self.flow,
                    self.rewards,
                    prompts,
                    conditioning,
                    pairs,
                    points,
                    seed=self.seed,
                    epoch=epoch,
                    sampling=self.sampling,
                    churn_factor=self.adaptation.churn_factor(epoch),
                    device=self.context.device,
                    drop=self.failures.drops_pairs,
                    after=last,
                )

    def weigh_scores(self, rollout: Rollout, endpoint_difference: Tensor, epoch: int) -> Tensor:
        """Gathers the scores of all devices, checks how many pairs were dropped, and weighs the rest.

        Dropped pairs have a difference of 0, which makes their loss 0. The differences of the others are multiplied by
        num_pairs / kept. This multiplies their loss and gradient by the same factor: the loss contains r and |r|, so it
        is not linear in the difference r, but loss(c * r) = c * loss(r) for every c >= 0.

        Returns:
            [2P], half differences of the mixture's total of this device's pairs, as they train.

        Raises:
            RewardError: more pairs were dropped than `failures.max_dropped` allows.
        """
        num_pairs = self.plan.num_pairs
        gathered = gather(rollout, endpoint_difference, num_pairs, self.context.all_sum)
        kept = int(kept_pairs(gathered.scores).sum())
        dropped = 1 - kept / num_pairs
        if dropped > self.failures.max_dropped:
            raise RewardError(
                f"rewards failed for {num_pairs - kept} of {num_pairs} pairs of epoch {epoch}, max_dropped is "
                f"{self.failures.max_dropped:.0%}; the warnings above name them"
            )
        prompts = [prompt.text for prompt in self.prompts_of(epoch, range(num_pairs))]
        self.scores = weigh(gathered, prompts, self.rewards, epoch)
        self.metrics = rollout_metrics(self.scores, self.rewards, epoch)
        self.metrics["rollout/images_per_second"] = 2 * kept / rollout.seconds
        if self.failures.drops_pairs:
            self.metrics["reward/dropped"] = dropped
        self._adapt(epoch)
        trained = self.adaptation.scale(epoch, self.scores.difference, self.scores.kept_rows)
        difference = trained[own_rows(rollout.pairs)]
        return difference * (num_pairs / kept) if dropped else difference

    def _add_gradients(
        self, rollout: Rollout, directions: Tensor, difference: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Adds the pull of the terms that train by their gradient, and logs the size of each."""
        scores, rows = cast(EpochScores, self.scores), own_rows(rollout.pairs)
        own = {name: one.select(rows) for name, one in scores.scores.items()}
        kept, num_kept = scores.kept_rows[rows], int(scores.kept.sum())
        pulls = self.rewards.pulls(rollout.gradients, own, epoch)
        for name, pull in pulls.items():
            squares = self.context.all_sum(pull[kept].pow(2).flatten(1).mean(dim=1).sum()[None]).item()
            self.metrics[f"reward/{name}/gradient"] = (squares / (2 * num_kept)) ** 0.5
        total = self.adaptation.scaled(torch.stack(list(pulls.values())).sum(dim=0))
        total[~kept] = 0.0
        distance = None if self.normalization == "mean_square" else scores.distance[rows].sqrt()
        return add_gradient(directions, difference, total * (self.plan.num_pairs / num_kept), distance)

    def _adapt(self, epoch: int) -> None:
        """Moves the churn's factor for the next epoch, and logs this one's."""
        if isinstance(self.sampling.churn, AdaptiveChurn):
            self.metrics["rollout/churn_factor"] = self.adaptation.churn_factor(epoch)
            self.adaptation.steer_churn(epoch, self.metrics["rollout/pair_distance"])
