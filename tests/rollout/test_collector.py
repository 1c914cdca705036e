"""The training loader: an epoch of pairs, its scores, and its batches of points."""

import copy
import itertools
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lightning_fdfo import Reward, RewardMix
from lightning_fdfo.errors import RewardError, StoppedError
from lightning_fdfo.flows.generate import encode_prompts
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout import collector as collecting
from lightning_fdfo.rollout.collector import RolloutCollector
from lightning_fdfo.rollout.pairs import start_rollout
from lightning_fdfo.rollout.plan import BatchPlan
from lightning_fdfo.rollout.run_context import RunContext
from tests.conftest import ToyFlow, brightness
from tests.rollout.test_pairs import CPU, PROMPTS, SAMPLING


class OneOfSome:
    """The devices of a run, seen from one; its sums over devices are its own, and events are noted."""

    device, epoch, folder = CPU, 0, Path("run")

    def __init__(self, rank):
        self.rank, self.events = rank, []

    def precision(self):
        return nullcontext()

    def all_sum(self, values):
        return values

    def track(self, batches):
        return iter(batches)

    def announce(self, event, *arguments):
        self.events.append((event, *arguments))


def make_collector(rank=0, world_size=1, chunk_size=4, calls=None, num_points=4, monkeypatch=None):
    plan = BatchPlan.derive(
        num_pairs=8,
        updates_per_epoch=2,
        num_steps=6,
        num_points_per_pair=num_points,
        batch_size=4,
        world_size=world_size,
    )
    flow = ToyFlow()
    flow.load()
    rewards = RewardMix({"brightness": RewardTerm(brightness)})
    collector = RolloutCollector(
        flow, rewards, PROMPTS, plan, SAMPLING, OneOfSome(rank), seed=0, rollout_batch_size=chunk_size
    )
    if calls is not None:

        def run(flow, rewards, prompts, conditioning, pairs, points, **options):
            calls.append(([p.text for p in prompts], list(pairs)))
            expected = encode_prompts(flow, prompts, 1.0, batch_size=2).tensors["embeds"]
            assert torch.equal(conditioning.tensors["embeds"], expected)
            return start_rollout(flow, rewards, prompts, conditioning, pairs, points, **options)

        monkeypatch.setattr(collecting, "start_rollout", run)
    return collector


def test_each_update_takes_equally_many_points_from_every_pair():
    batches = list(make_collector())
    assert len(batches) == len(make_collector()) == 8
    for update in (batches[:4], batches[4:]):
        absolute = torch.cat([batch.reward_difference.abs() for batch in update])
        assert sorted(torch.unique(absolute, return_counts=True)[1].tolist()) == [2] * 8


def test_two_devices_make_the_pairs_of_one(monkeypatch):
    alone, shared = [], []
    list(make_collector(calls=alone, chunk_size=8, monkeypatch=monkeypatch))
    for rank in range(2):
        list(make_collector(rank, world_size=2, calls=shared, chunk_size=8, monkeypatch=monkeypatch))
    assert ([t for texts, _ in shared for t in texts], [p for _, pairs in shared for p in pairs]) == alone[0]


def test_callbacks_are_called_before_each_batch_and_with_all_that_an_epoch_gave():
    collector = make_collector(chunk_size=3)
    list(collector)
    *batches, (event, rollout, scores) = collector.context.events
    assert batches == [("on_rollout_batch_start",)] * 3
    assert (event, list(rollout.pairs)) == ("on_rollout_end", list(range(8)))
    assert scores is collector.scores
    assert scores.prompts == list(rollout.prompts) == [prompt.text for prompt in collector.prompts_of(0, range(8))]
    assert torch.equal(scores.scores["brightness"].values, rollout.scores["brightness"].values)
    assert torch.equal(scores.difference, scores.differences["brightness"].values)
    assert collector.metrics["reward/mean"] == pytest.approx(scores.scores["brightness"].values.mean().item())


def test_a_copy_has_no_trainer():
    copied = copy.deepcopy(RunContext(object()))
    with pytest.raises(RuntimeError, match="a copy of a RunContext has no trainer"):
        copied.epoch  # noqa: B018


# One batch of pairs is scored while the next one is sampled. `cpu:0` stands for another device than the flow's.


class Elsewhere(Reward):
    """The brightness, on another device: batch n waits for event n, if there is one, and some batches fail."""

    device = "cpu:0"

    def __init__(self, events=(), fails=(), seconds=0.0):
        self.events, self.fails, self.seconds = events, fails, seconds
        self.begun = self.ended = 0

    def __call__(self, images, prompts, metadata):
        assert self.begun == self.ended  # two calls at a time are more than a reward must stand
        batch, self.begun = self.begun, self.begun + 1
        if self.events:
            assert self.events[batch].wait(timeout=10)
        time.sleep(self.seconds)
        self.ended += 1
        if batch in self.fails:
            raise ValueError("no light")
        return brightness(images, prompts, metadata)


def collector_of(reward):
    """Four batches of two pairs."""
    collector = make_collector(chunk_size=2)
    collector.rewards = RewardMix({"brightness": RewardTerm(reward)})
    collector.rewards.setup(CPU)
    return collector


def test_a_batch_is_scored_while_the_next_one_is_sampled(monkeypatch):
    sampled = [threading.Event() for _ in range(4)]
    (no_next := threading.Event()).set()
    collector = collector_of(Elsewhere(events=[*sampled[1:], no_next]))
    decode, count = ToyFlow.decode, itertools.count()

    def watched(self, latents):
        sampled[next(count)].set()
        return decode(self, latents)

    monkeypatch.setattr(ToyFlow, "decode", watched)
    ours = collector.collect(0)
    monkeypatch.undo()
    theirs = make_collector(chunk_size=2).collect(0)  # on the flow's device: one after the other
    assert torch.equal(ours.scores["brightness"].values, theirs.scores["brightness"].values)
    assert torch.equal(ours.points.latents, theirs.points.latents)
    assert ours.pairs == theirs.pairs


def test_a_failure_that_is_seen_a_batch_later_names_its_own_pairs():
    with pytest.raises(RewardError, match=r"^pair 2 of epoch 0: .*no light"):
        collector_of(Elsewhere(fails=(1, 2))).collect(0)  # the second batch, and its first image by itself
    with pytest.raises(RewardError, match=r"^pair 6 of epoch 0: prompt '.*': reward 'brightness'"):
        collector_of(Elsewhere(fails=(3, 4))).collect(0)  # the last one


@pytest.mark.parametrize(("error", "waits"), [(ValueError, True), (StoppedError, True), (KeyboardInterrupt, False)])
def test_an_error_waits_for_the_reward_that_still_runs_and_ctrl_c_does_not(error, waits):
    reward, batches = Elsewhere(seconds=1.0), itertools.count()
    collector = collector_of(reward)

    def announce(*_):
        if next(batches):
            while not reward.begun:
                time.sleep(0.001)
            raise error

    collector.context.announce = announce
    with pytest.raises(error):
        collector.collect(0)
    assert (reward.begun, reward.ended) == (1, int(waits))
    while not reward.ended:  # a thread that is still in PyTorch when the process ends would abort it
        time.sleep(0.01)


def test_a_rollouts_seconds_are_those_of_the_clock():
    """Scoring lies beside sampling: their sum would be more than the time that passed."""
    collector, begun = collector_of(Elsewhere(seconds=0.05)), time.perf_counter()
    rollout = collector.collect(0)
    assert 4 * 0.05 <= rollout.seconds <= time.perf_counter() - begun


def test_batches_for_a_gpu_are_pinned(monkeypatch):
    """No GPU is needed to see what is asked for; the sampler itself stays on the CPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    collector = make_collector()
    rollout = collector.collect(0)
    monkeypatch.setattr(collector, "collect", lambda epoch: rollout)
    plain = list(collector)
    assert not pinned
    collector.context.device = torch.device("cuda")
    for batch, theirs in zip(collector, plain, strict=True):
        own = [*batch[:5], *batch.conditioning.tensors.values()]
        assert len(pinned) == len(own)
        assert all(one is other for one, other in zip(pinned, own, strict=True))
        assert torch.equal(batch.latents, theirs.latents)
        pinned.clear()
