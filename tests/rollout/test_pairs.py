from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from lightning_fdfo import RewardMix, Sampling
from lightning_fdfo.flows import StableDiffusion3
from lightning_fdfo.flows.generate import encode_prompts, generate
from lightning_fdfo.objective import half_differences, normalize_difference
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.randomness import Stream, generator
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.pairs import start_rollout
from lightning_fdfo.rollout.plan import BatchPlan
from lightning_fdfo.rollout.points import allocate_points, choose_points, deal_points
from tests.conftest import ToyFlow, brightness

PROMPTS = [Prompt(text, "", {"row": row}, f"p:{row}") for row, text in enumerate(["a cat", "the dog", "some bird"])]
SAMPLING = Sampling(num_steps=6, height=2, width=2, churn=0.2)
CPU = torch.device("cpu")


def make_rollout(pairs=range(4), sampling=SAMPLING, seed=0, epoch=0, num_points=None):
    flow = ToyFlow()
    flow.load()
    rewards = RewardMix({"brightness": RewardTerm(brightness)})
    prompts = [PROMPTS[pair % 3] for pair in pairs]
    conditioning = encode_prompts(flow, prompts, sampling.guidance_scale, batch_size=3)
    steps, run = sampling.num_steps, {"seed": seed, "epoch": epoch}
    store = sampling.store_dtype
    points = allocate_points(pairs, steps, num_points or 2 * steps, flow.latent_shape(2, 2), **run, store=store)
    return start_rollout(
        flow, rewards, prompts, conditioning, pairs, points, sampling=sampling, device=CPU, **run
    ).result()


def starts(rollout):
    """The initial latents of each branch, [2P, ...]."""
    chosen = rollout.points.chosen
    rows = [
        rollout.points.latents[pair, ((chosen[pair, :, 0] == branch) & (chosen[pair, :, 1] == 0)).nonzero().item()]
        for pair in range(len(chosen))
        for branch in range(2)
    ]
    return torch.stack(rows)


def differences(rollout):
    """Half differences of the final latents and of the rewards."""
    values = rollout.scores["brightness"].values.float()
    return half_differences(rollout.points.ends), half_differences(values)


def test_shapes_and_rest():
    rollout = make_rollout()
    assert rollout.points.latents.shape == rollout.points.velocities.shape == (4, 12, 3, 2, 2)
    assert rollout.points.ends.shape == (8, 3, 2, 2)
    assert rollout.scores["brightness"].values.shape == (8,)
    assert not rollout.points.latents.requires_grad


def test_without_churn_the_branches_are_one():
    sampling = Sampling(num_steps=6, height=2, width=2, churn=0.0)
    ends = make_rollout(sampling=sampling).points.ends
    assert torch.equal(half_differences(ends), torch.zeros_like(ends))


def test_antithetic_branches_start_on_both_sides_of_the_same_latents():
    first, second = starts(make_rollout(sampling=replace(SAMPLING, antithetic=True)))[:2]
    rho = 1 / (1 + SAMPLING.churn)
    shared = torch.randn(3, 2, 2, generator=generator(Stream.LATENTS, 0, 0, 0))
    torch.testing.assert_close((first + second) / 2, rho * shared)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("chunks", [[range(0, 1), range(1, 4)], [range(0, 2), range(2, 4)]])
def test_a_rollout_does_not_depend_on_its_batch_size(chunks):
    whole = make_rollout()
    parts = [make_rollout(chunk) for chunk in chunks]
    latents = torch.cat([part.points.latents for part in parts])
    torch.testing.assert_close(latents, whole.points.latents, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([starts(part) for part in parts]), starts(whole))


def test_epochs_and_seeds_differ():
    first, *others = [starts(make_rollout(seed=s, epoch=e)) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("num_points", [1, 3, 4])
def test_points_that_are_chosen_first_are_those_of_the_whole_trajectory(num_points):
    few, whole = make_rollout(num_points=num_points), make_rollout()
    for pair, chosen in enumerate(few.points.chosen):
        assert len(chosen) == num_points
        for point, one in enumerate(chosen):
            (there,) = (whole.points.chosen[pair] == one).all(dim=1).nonzero().flatten()
            for name in ("latents", "velocities"):
                ours, theirs = getattr(few.points, name), getattr(whole.points, name)
                assert torch.equal(ours[pair, point], theirs[pair, there])
    assert torch.equal(few.points.ends, whole.points.ends)


def test_velocities_may_be_stored_in_bfloat16():
    exact, stored = make_rollout(), make_rollout(sampling=replace(SAMPLING, store="bfloat16"))
    assert stored.points.velocities.dtype == torch.bfloat16
    assert torch.equal(stored.points.latents, exact.points.latents)
    torch.testing.assert_close(stored.points.velocities.float(), exact.points.velocities, rtol=2**-8, atol=0)


def test_a_flow_that_computes_in_bfloat16_loses_nothing_by_storing_it():
    flow = StableDiffusion3("tiny-digits", dtype="bfloat16", max_sequence_length=0)
    flow.load()
    prompts, shape, run = [Prompt('"427" in red', "", {}, "p:1")], flow.latent_shape(32, 64), {"seed": 0, "epoch": 0}
    conditioning = encode_prompts(flow, prompts, 1.0, 1)
    stored = []
    for dtype in (torch.float32, torch.bfloat16):
        points = allocate_points([0], 3, 6, shape, store=dtype, **run)
        rewards = RewardMix({"brightness": RewardTerm(brightness)})
        sampling = Sampling(num_steps=3, height=32, width=64)
        start_rollout(flow, rewards, prompts, conditioning, [0], points, sampling=sampling, device=CPU, **run).result()
        stored.append(points.velocities.float())
    assert torch.equal(*stored)


def test_another_device_fills_the_same_points():
    """The meta device stands for one: it has shapes only, so that nothing may look at its numbers."""
    points = make_rollout(range(2)).points
    there = points.on(torch.device("meta"))
    assert points.on(CPU) is points
    assert there.latents.shape == points.latents.shape
    assert there.latents.device.type == there.ends.device.type == "meta"
    copied, ends = points.latents.clone(), points.ends.clone()
    other = replace(points, latents=copied + 1, ends=ends + 1)
    points.take(other)
    assert torch.equal(points.latents, copied + 1)
    assert torch.equal(points.ends, ends + 1)


@pytest.mark.parametrize("num_points", [1, 2, 4, 12])
def test_points_are_stratified_in_time_and_equally_likely(num_points):
    counts = torch.zeros(2, 6)
    for pair in range(2000):
        chosen = choose_points(0, 0, pair, num_steps=6, num_points=num_points)
        strata = (2 * chosen[:, 1] + chosen[:, 0]) * num_points // 12
        assert sorted(strata.tolist()) == list(range(num_points))
        counts[chosen[:, 0], chosen[:, 1]] += 1
    share = counts / (2000 * num_points)
    assert (share - 1 / 12).abs().max() < 0.03


def test_batches_hold_what_the_rollout_saw():
    rollout = make_rollout(range(8))
    plan = BatchPlan(num_pairs=8, updates_per_epoch=1, points_per_pair=12, batch_size=96)
    endpoint_difference, reward_difference = differences(rollout)
    (batch,) = deal_points(
        rollout.points,
        rollout.sigmas,
        rollout.conditioning,
        normalize_difference(endpoint_difference),
        reward_difference,
        plan,
    )
    flow = ToyFlow()
    flow.load()
    with torch.no_grad():
        replayed = flow.velocity(batch.latents, batch.sigma, batch.conditioning)
    torch.testing.assert_close(replayed, batch.old_velocity)
    directions = normalize_difference(endpoint_difference)
    pairs = {(d.item(), tuple(a.flatten().tolist())) for d, a in zip(reward_difference, directions, strict=True)}
    seen = [
        (d.item(), tuple(a.flatten().tolist())) for d, a in zip(batch.reward_difference, batch.direction, strict=True)
    ]
    assert set(seen) == pairs
    assert all(seen.count(one) == 6 for one in pairs)


def test_validation_images_are_fixed_and_without_churn():
    flow = ToyFlow()
    flow.load()
    images = generate(flow, PROMPTS, [0, 1, 2], seed=0, sampling=SAMPLING, device=CPU)
    again = generate(
        flow, PROMPTS[2:], [2], seed=0, sampling=Sampling(num_steps=6, height=2, width=2, churn=9), device=CPU
    )
    torch.testing.assert_close(images[2:], again)
    assert images.shape == (3, 3, 2, 2)


class CountingFlow(ToyFlow):
    """Notes when its text encoders are on the device, and what is encoded then."""

    def __init__(self):
        super().__init__()
        self.log = []

    @contextmanager
    def encoding(self):
        self.log.append("open")
        yield
        self.log.append("closed")

    def encode(self, prompts, negative_prompts=None):
        self.log.append((len(prompts), negative_prompts))
        return super().encode(prompts)


def test_texts_are_encoded_while_the_encoders_are_there_and_negatives_only_for_guidance():
    flow = CountingFlow()
    assert len(encode_prompts(flow, PROMPTS, 1.0, batch_size=2)) == 3
    encode_prompts(flow, PROMPTS[:1], 2.0, batch_size=2)
    assert flow.log == ["open", (2, None), (1, None), "closed", "open", (1, [""]), "closed"]


def test_a_text_that_comes_several_times_is_encoded_once():
    flow, again = CountingFlow(), [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[0]]
    rows = encode_prompts(flow, again, 1.0, batch_size=2).tensors["embeds"]
    assert flow.log == ["open", (2, None), (1, None), "closed"]
    assert torch.equal(rows, encode_prompts(ToyFlow(), PROMPTS, 1.0, batch_size=3)[[1, 0, 1, 2, 0]].tensors["embeds"])


def test_texts_with_other_negatives_are_others():
    flow = CountingFlow()
    encode_prompts(flow, [PROMPTS[0]._replace(negative=negative) for negative in ("a", "b", "a")], 2.0, batch_size=4)
    assert flow.log == ["open", (2, ["a", "b"]), "closed"]


class EmbeddedFlow(CountingFlow):
    guidance = "embedded"


def test_embedded_guidance_needs_no_negatives():
    flow = EmbeddedFlow()
    encode_prompts(flow, PROMPTS[:1], 3.5, batch_size=2)
    assert flow.log == ["open", (1, None), "closed"]
