"""Algorithms by name: the hook, groups of pairs, and FDFO itself written as one."""

import pytest
import torch

from lightning_fdfo import Objective, Sampling
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.objective import half_differences, normalize_difference
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.algorithm import Algorithm, Context, Targets, group_advantages
from lightning_fdfo.rollout.collector import RolloutCollector
from lightning_fdfo.rollout.plan import BatchPlan
from lightning_fdfo.training.step import batch_loss, fdfo_loss
from tests.conftest import ToyFlow, brightness, trainable
from tests.rollout.test_collector import OneOfSome


class AsFDFO(Algorithm):
    """FDFO, by the hook."""

    def __init__(self, again=False):
        self.again = again

    def targets(self, rollout, context):
        points = rollout.points
        branch, step = points.chosen.unbind(-1)
        row = 2 * torch.arange(len(branch))[:, None] + branch
        direction = normalize_difference(half_differences(points.ends), "root_mean_square")
        assert context.sampling.num_steps == 4
        advantage = half_differences(context.totals)[context.rows]
        velocities = points.velocities
        if self.again:
            which = torch.arange(len(branch)).repeat_interleave(branch.shape[1])
            found = context.velocity(points.latents.flatten(0, 1), rollout.sigmas[step].flatten(), which)
            velocities = found.view_as(velocities)
        return Targets(points.latents, rollout.sigmas[step], velocities, direction[row], advantage[row])

    def loss(self, velocity, batch):
        return fdfo_loss(velocity, batch, clip_range=0.03)


def test_fdfo_as_an_algorithm_is_fdfo(toy_module, fit):
    ends = []
    for algorithm in (None, AsFDFO()):
        module = toy_module(objective=Objective(normalization="root_mean_square"), algorithm=algorithm)
        fit(module, 3)
        ends.append(trainable(module))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_velocity_that_it_may_ask_for_is_the_rollouts(toy_module, fit):
    ends = []
    for again in (False, True):
        module = toy_module(algorithm=AsFDFO(again))
        fit(module, 3)
        ends.append(trainable(module))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:dropped")
def test_a_dropped_pair_is_in_no_advantage_and_teaches_nothing(toy_module, fit):
    """Also where the loss of an advantage of 0 has a gradient."""
    seen, losses = [], []

    class Watched(AsFDFO):
        def targets(self, rollout, context):
            seen.append((context, group_advantages(context)))
            return super().targets(rollout, context)

        def loss(self, velocity, batch):
            losses.append((batch, velocity))
            return (velocity - 1).pow(2).flatten(1).mean(dim=1), {}

    def partly(images, prompts, metadata):
        if any(prompt.startswith("the") for prompt in prompts):
            raise ValueError("no dogs")
        return images.mean(dim=(1, 2, 3)) - 10

    options = {"on_reward_error": "drop_pair", "max_dropped": 0.5, "updates_per_epoch": 1, "batch_size": 128}
    module = toy_module(rewards={"partly": RewardTerm(partly)}, algorithm=Watched(), **options)
    fit(module, 1)
    (context, advantages), (batch, velocity) = seen[0], losses[0]
    dropped = ~module.collector.scores.kept
    assert dropped.any()
    assert not advantages[dropped.repeat_interleave(2)].any()
    whole = context._replace(
        totals=context.totals[context.kept],
        prompts=[text for text, kept in zip(context.prompts, ~dropped, strict=True) if kept],
        kept=context.kept[context.kept],
    )
    torch.testing.assert_close(advantages[context.kept], group_advantages(whole))
    weight = batch.weight.view(-1, 16)  # a row a point, a column a pair
    factor = 16 / (16 - int(dropped.sum()))
    assert torch.equal(weight, torch.where(dropped, 0.0, factor).expand_as(weight))
    loss, _ = batch_loss(velocity, batch, Watched().loss, 0.0, lambda: velocity)
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert not gradient.view(-1, 16, 12)[:, dropped].any()
    assert gradient.view(-1, 16, 12)[:, ~dropped].any()


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"objective": Objective(reward_clip=1.0)}, "objective.reward_clip"),
        ({"objective": Objective(reward_scale="std")}, "objective.reward_scale"),
        ({"rewards": {"brightness": RewardTerm(brightness, clip=1.0)}}, "rewards.brightness.clip"),
        ({"rewards": {"colours": {"reward": "Colorfulness", "gradient": True}}}, "rewards.colours.gradient"),
    ],
)
def test_what_would_have_no_effect_is_refused(toy_module, option, named):
    with pytest.raises(ConfigurationError, match=f"{named} would have no effect with AsFDFO"):
        toy_module(algorithm=AsFDFO(), **option)


class Wrong(AsFDFO):
    """Gives what a module cannot train on."""

    def __init__(self, change=lambda targets: targets, change_loss=lambda loss: loss):
        super().__init__()
        self.change, self.change_loss = change, change_loss

    def targets(self, rollout, context):
        return self.change(super().targets(rollout, context))

    def loss(self, velocity, batch):
        loss, logged = super().loss(velocity, batch)
        return self.change_loss(loss), logged


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (Wrong(lambda targets: tuple(targets)), "Wrong.targets: expected Targets, got tuple"),
        (
            Wrong(lambda targets: Targets(*(each[:, :3] for each in targets))),
            r"Wrong.targets: expected latents of shape \[16, 8, 3, 2, 2\], got \[16, 3, 3, 2, 2\]",
        ),
        (
            Wrong(lambda targets: targets._replace(advantage=targets.advantage[:, 0])),
            r"Wrong.targets: expected advantage of shape \[16, 8\], got \[16\]",
        ),
        (Wrong(lambda targets: targets._replace(sigma=0.5)), r"expected sigma of shape \[16, 8\], got float"),
        (Wrong(change_loss=torch.mean), r"Algorithm.loss: expected a loss a point, of shape \[\d+\], got \[\]"),
    ],
)
def test_what_it_may_not_give_is_named(toy_module, fit, algorithm, message):
    with pytest.raises(ConfigurationError, match=message):
        fit(toy_module(algorithm=algorithm), 1)


# Groups


def context(totals, prompts, kept=None):
    kept = torch.ones(len(totals), dtype=torch.bool) if kept is None else kept
    return Context(totals, kept, prompts, torch.arange(len(totals)), None, Sampling(), 0, 0)


def test_advantages_are_of_a_prompts_own_images():
    totals, prompts = torch.randn(12, dtype=torch.float64), ["a", "b", "a", "b", "b", "c"]
    found = group_advantages(context(totals, prompts))
    for text in "abc":
        own = torch.tensor([prompt == text for prompt in prompts]).repeat_interleave(2)
        values = totals[own]
        expected = (values - values.mean()) / (values.std(correction=0) + 1e-4)
        torch.testing.assert_close(found[own], expected.float())
    assert not group_advantages(context(torch.full((4,), 0.3), ["a", "a"])).any()


def collector(pairs_per_prompt, rank=0, devices=1):
    prompts = [Prompt(text, "", {}, text) for text in ("a", "b", "c", "d", "e")]
    plan = BatchPlan(num_pairs=12, updates_per_epoch=1, points_per_pair=2, batch_size=4, world_size=devices)
    rewards = RewardMix({"brightness": RewardTerm(brightness)})
    sampling = Sampling(num_steps=2, height=2, width=2)
    return RolloutCollector(
        ToyFlow(), rewards, prompts, plan, sampling, OneOfSome(rank), seed=0, pairs_per_prompt=pairs_per_prompt
    )


@pytest.mark.parametrize("each", [1, 2, 3, 4])
def test_pairs_of_a_prompt_stand_side_by_side_on_any_number_of_devices(each):
    found = collector(each)
    dealt = [[prompt.text for prompt in found.prompts_of(epoch, range(12))] for epoch in range(5)]
    for row in dealt:
        assert all(len(set(row[start : start + each])) == 1 for start in range(0, 12, each))
    draws = [row[start] for row in dealt for start in range(0, 12, each)]
    assert sorted(draws[:5]) == ["a", "b", "c", "d", "e"]  # each prompt as often as every other
    for pairs in (range(0, 4), range(3, 7), range(6, 12), range(11, 12)):
        assert [prompt.text for prompt in found.prompts_of(2, pairs)] == dealt[2][pairs.start : pairs.stop]


def test_pairs_that_do_not_divide_are_refused(toy_module):
    with pytest.raises(ConfigurationError, match="pairs_per_prompt: expected a divisor of num_pairs 16, got 3"):
        toy_module(pairs_per_prompt=3)
