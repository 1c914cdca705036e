"""How much memory an epoch takes at its peak, against the formula that users are told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_fdfo import Reward, RewardMix, Sampling
from lightning_fdfo.guards.memory import added_latents, rollout_bytes
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.collector import RolloutCollector
from lightning_fdfo.rollout.plan import BatchPlan
from tests.conftest import ToyFlow, brightness
from tests.rollout.test_collector import OneOfSome

STATUS = Path("/proc/self/status")
PAIRS, STEPS, CHUNK, SHAPE = 64, 20, 4, (16, 64, 64)


class LargeFlow(ToyFlow):
    """Latents of the size of SD3.5's at 512 px, and a velocity that costs nothing."""

    def latent_shape(self, height, width):
        return SHAPE

    def velocity(self, latents, sigma, conditioning, guidance_scale=1.0):
        return latents * sigma

    def decode(self, latents):
        return latents[:, :3, :2, :2].sigmoid()


class Bright(Reward):
    """Brightness, with its gradient."""

    differentiable = True

    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))


def added(num_points, store, gradient):
    """The peak of resident memory that an epoch adds, in bytes; a small one has made torch allocate its own before."""
    epoch(2, num_points, store, gradient)
    before = peak()
    epoch(PAIRS, num_points, store, gradient)
    return peak() - before


def peak():
    """Bytes, of this program alone: what `getrusage` tells begins with the peak of the process that started it."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def epoch(num_pairs, num_points, store, gradient):
    """Goes through an epoch."""
    flow = LargeFlow()
    flow.load()
    plan = BatchPlan.derive(
        num_pairs=num_pairs, updates_per_epoch=1, num_steps=STEPS, num_points_per_pair=num_points, batch_size=2,
        world_size=1,
    )  # fmt: skip
    sampling = Sampling(num_steps=STEPS, height=2, width=2, churn=0.1, store=store)
    rewards = RewardMix({"brightness": RewardTerm(brightness), "bright": RewardTerm(Bright(), gradient=gradient)})
    prompts = [Prompt("a cat", "", {}, "p:1")]
    collector = RolloutCollector(flow, rewards, prompts, plan, sampling, OneOfSome(0), seed=0, rollout_batch_size=CHUNK)
    for _ in collector:
        pass


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux, which tells a program's peak")
@pytest.mark.parametrize("gradient", [False, True], ids=["differences", "gradient"])
@pytest.mark.parametrize(("num_points", "store"), [(40, "float32"), (5, "float32"), (40, "bfloat16")])
def test_the_peak_is_at_most_115_percent_of_the_formula(num_points, store, gradient):
    """In a process of its own, for a peak never falls."""
    line = f"from tests.rollout.test_peak_memory import added; print(added({num_points}, {store!r}, {gradient}))"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    size, itemsize = json.loads(done.stdout), getattr(torch, store).itemsize
    more = added_latents(num_points, int(gradient), algorithm=False)
    told = rollout_bytes(PAIRS, num_points, torch.Size(SHAPE).numel(), 0, itemsize, more)
    print(f"\n{num_points} of {2 * STEPS} points, {store}: {size / 2**20:.0f} MiB, {size / told:.3f} of the formula")
    assert 0.9 < size / told <= 1.15
