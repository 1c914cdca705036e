"""The same mathematics as a plain PyTorch loop: no Lightning, no module, no callback, no guard, no file, no log.

What it takes from the package are random numbers alone (`lightning_fdfo/randomness.py`, and which points of a pair
train), so that its weights must be those of `fit`.
"""

from __future__ import annotations

import time

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lightning_fdfo.flows.registry import JOINT_ATTENTION
from lightning_fdfo.randomness import Stream, generator, prompt_rows
from lightning_fdfo.rollout.points import choose_points
from tests.benchmarks.tiny_flow import CHANNELS, PROMPTS, Sizes, embed, make_transformer


class BareLoop:
    """A transformer with a LoRA, and its optimiser.

    Args:
        sizes: of the model and of an epoch.
        start: name -> a LoRA's first weights.
    """

    def __init__(self, sizes: Sizes, start: dict[str, Tensor]) -> None:
        self.sizes = sizes
        self.transformer = make_transformer(sizes)
        self.transformer.add_adapter(
            LoraConfig(r=sizes.rank, lora_alpha=sizes.alpha, target_modules=list(JOINT_ATTENTION))
        )
        self.transformer.eval()
        self.trained = {name: each for name, each in self.transformer.named_parameters() if each.requires_grad}
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(start[name])
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=sizes.lr, weight_decay=1e-4)

    def epoch(self, number: int) -> tuple[float, float]:
        """One epoch; returns the seconds of its rollout and of its training."""
        start = time.perf_counter()
        points = self.roll_out(number)
        rolled = time.perf_counter()
        self.train(*points)
        return rolled - start, time.perf_counter() - rolled

    def velocity(self, latents: Tensor, sigma: Tensor, texts: Tensor, pooled: Tensor) -> Tensor:
        """The transformer's, at a noise level for each row."""
        return self.transformer(latents, texts, pooled, 1000 * sigma, return_dict=False)[0]

    @torch.no_grad()
    def roll_out(self, epoch: int) -> tuple[Tensor, ...]:
        """Points to train on: latents, sigma, old velocity, direction, reward difference, texts and pooled texts."""
        sizes, shape = self.sizes, (CHANNELS, self.sizes.side, self.sizes.side)
        prompts = prompt_rows(0, epoch * sizes.pairs, sizes.pairs, len(PROMPTS))
        texts, pooled = (
            torch.stack(one) for one in zip(*(embed(PROMPTS[p], sizes.width) for p in prompts), strict=True)
        )
        sigmas = torch.linspace(1, 0, sizes.steps + 1)
        states, velocities, ends = [], [], []
        for start in range(0, sizes.pairs, sizes.rollout_batch_size):
            pairs = range(start, min(start + sizes.rollout_batch_size, sizes.pairs))
            rows = torch.tensor([pair for pair in pairs for _ in range(2)])
            generators = [generator(Stream.LATENTS, 0, epoch, pair) for pair in pairs]
            first = torch.stack([torch.randn(shape, generator=each) for each in generators])
            rho = torch.tensor(1 / (1 + sizes.churn))
            fresh = (1 - rho**2).sqrt()

            def noise(generators=generators) -> Tensor:
                return torch.cat([torch.randn((2, *shape), generator=each) for each in generators])

            x = rho * first.repeat_interleave(2, dim=0) + fresh * noise()
            way, slopes = [], []
            for k in range(sizes.steps):
                v = self.velocity(x, sigmas[k].expand(len(x)), texts[rows], pooled[rows])
                way.append(x)
                slopes.append(v)
                step = (sigmas[k + 1] - sigmas[k]) * v
                if k + 1 < sizes.steps:
                    lost = (1 - rho) * (x + (1 - sigmas[k]) * v)
                    step = step + sigmas[k + 1] * (fresh * noise() - lost)
                x = x + step
            states.append(torch.stack(way, dim=1))
            velocities.append(torch.stack(slopes, dim=1))
            ends.append(x)
        return self.choose(epoch, sigmas, torch.cat(states), torch.cat(velocities), torch.cat(ends), texts, pooled)

    def choose(
        self,
        epoch: int,
        sigmas: Tensor,
        states: Tensor,
        velocities: Tensor,
        ends: Tensor,
        texts: Tensor,
        pooled: Tensor,
    ) -> tuple[Tensor, ...]:
        """Scores, differences, directions, and the points in the order in which they train."""
        sizes = self.sizes
        scores = ends[:, :3].sigmoid().mean(dim=(1, 2, 3))
        partner = torch.arange(len(ends)) ^ 1
        reward_difference = (scores - scores[partner]) / 2
        difference = (ends - ends[partner]) / 2
        direction = difference / (difference.flatten(1).pow(2).mean(dim=1) + 1e-6).sqrt()[:, None, None, None]
        chosen = torch.stack(
            [choose_points(0, epoch, pair, sizes.steps, sizes.points) for pair in range(sizes.pairs)], dim=1
        )
        pair = torch.arange(sizes.pairs).repeat(sizes.points)
        branch, step = chosen.flatten(0, 1).unbind(1)
        row = 2 * pair + branch
        return (
            states[row, step], sigmas[step], velocities[row, step], direction[row], reward_difference[row], texts[pair],
            pooled[pair],
        )  # fmt: skip

    def train(self, *points: Tensor) -> None:
        """One update, accumulated from all batches."""
        batches = list(zip(*(each.split(self.sizes.batch_size) for each in points), strict=True))
        for latents, sigma, old_velocity, direction, reward_difference, texts, pooled in batches:
            delta = self.velocity(latents, sigma, texts, pooled) - old_velocity
            log_ratio = -delta.pow(2).flatten(1).mean(dim=1) - 2 * (delta * direction).flatten(1).mean(dim=1)
            ratio = log_ratio.exp()
            penalty = reward_difference.abs() / (2 * self.sizes.clip_range) * (ratio - 1) ** 2
            ((penalty - reward_difference * ratio).mean() / len(batches)).backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
