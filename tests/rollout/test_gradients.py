"""Rewards' own gradients: what they are, what they are added to, and runs that train by them."""

import pytest
import torch
from torch import nn

from lightning_fdfo import LoRA, Objective, Reward, RewardMix, Sampling
from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.flows.generate import encode_prompts
from lightning_fdfo.objective import add_gradient, half_differences, normalize_difference
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.scores import Scores
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.pairs import start_rollout
from lightning_fdfo.rollout.points import allocate_points
from tests.conftest import ToyFlow, brightness, trainable
from tests.test_module import Recorder

CPU = torch.device("cpu")
WEIGHTS = torch.linspace(-1, 1, 12).view(3, 2, 2)


class Bright(Reward):
    """Brightness, with its gradient."""

    differentiable = True

    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))


class Curved(Reward):
    """A quadratic reward of the latents, which it gets back from the images."""

    differentiable = True

    def __call__(self, images, prompts, metadata):
        latents = images.logit()
        return ((WEIGHTS * latents).flatten(1).sum(dim=1) + 0.05 * latents.flatten(1).pow(2).sum(dim=1)) / 12


class Failing(Reward):
    """One whose gradient fails, or is not finite, where the prompt says so."""

    differentiable = True

    def __call__(self, images, prompts, metadata):
        if images.requires_grad and "raises" in prompts[0]:
            raise ValueError("no gradient")
        scores = images.mean(dim=(1, 2, 3))
        return scores + (scores - scores.detach()).abs().sqrt() if "infinite" in prompts[0] else scores


class LinearFlow(ToyFlow):
    """A velocity that is a multiple of the latents: final latents differ in all directions alike."""

    def load(self):
        self.transformer = nn.Identity()

    def velocity(self, latents, sigma, conditioning, guidance_scale=1.0):
        return -0.5 * latents


def roll_out(flow, rewards, num_pairs=4, prompts=("a cat", "the dog"), churn=0.2, drop=False):
    flow.load()
    rewards, sampling = RewardMix(rewards), Sampling(num_steps=4, height=2, width=2, churn=churn)
    pairs = range(num_pairs)
    given = [Prompt(prompts[pair % len(prompts)], "", {}, f"p:{pair}") for pair in pairs]
    points = allocate_points(pairs, 4, 2, (3, 2, 2), seed=0, epoch=0)
    run = {"seed": 0, "epoch": 0, "sampling": sampling, "device": CPU, "drop": drop}
    conditioning = encode_prompts(flow, given, 1.0, batch_size=64)
    return rewards, start_rollout(flow, rewards, given, conditioning, pairs, points, **run).result()


def test_it_is_the_gradient_at_the_final_latents_through_the_decoder():
    _, rollout = roll_out(ToyFlow(), {"bright": RewardTerm(Bright(), gradient=True)})
    ends = rollout.points.ends.clone().requires_grad_()
    (expected,) = torch.autograd.grad(brightness(ends.sigmoid(), [], []).sum(), ends)
    torch.testing.assert_close(rollout.gradients["bright"], expected)
    assert not rollout.points.ends.requires_grad


@pytest.mark.parametrize("normalization", ["mean_square", "root_mean_square"])
def test_its_pull_is_the_expectation_of_the_secants(normalization):
    """On a linear flow: 6,000 pairs of 12 numbers; the secants' mean has an error of 12^0.5 / 12,000^0.5 = 3 %."""
    mix, rollout = roll_out(LinearFlow(), {"curved": RewardTerm(Curved(), gradient=True)}, num_pairs=6000, churn=0.01)
    difference, reward = half_differences(rollout.points.ends), half_differences(rollout.scores["curved"].values)
    direction = normalize_difference(difference, normalization)
    secant = (reward.float()[:, None, None, None] * direction).mean(dim=0)
    gradient = mix.pulls(rollout.gradients, rollout.scores)["curved"]
    distance = None if normalization == "mean_square" else difference.flatten(1).pow(2).mean(dim=1).sqrt()
    way, size = add_gradient(direction, torch.zeros(len(direction)), gradient, distance)
    exact = (size[:, None, None, None] * way).mean(dim=0)
    assert (secant - exact).norm() < 0.06 * exact.norm()
    assert exact.norm() > 0.1 * (1 if distance is None else distance.mean())


@pytest.mark.parametrize("normalization", ["mean_square", "root_mean_square"])
def test_both_pulls_add_up_and_the_direction_keeps_its_size(normalization):
    difference, reward, gradient = torch.randn(6, 3, 2), torch.randn(6), torch.randn(6, 3, 2)
    direction = normalize_difference(difference, normalization)
    distance = None if normalization == "mean_square" else difference.flatten(1).pow(2).mean(dim=1).sqrt()
    way, size = add_gradient(direction, reward, gradient, distance)
    scale = 1 if distance is None else distance[:, None, None]
    torch.testing.assert_close(
        size[:, None, None] * way, reward[:, None, None] * direction + scale * gradient, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(way.pow(2).mean(dim=(1, 2)), direction.pow(2).mean(dim=(1, 2)))
    alone, size = add_gradient(torch.zeros(6, 3, 2), torch.zeros(6), gradient)
    torch.testing.assert_close(size[:, None, None] * alone, gradient)
    nothing, size = add_gradient(direction, torch.zeros(6), torch.zeros(6, 3, 2))
    assert not nothing.any()
    assert not size.any()
    same, size = add_gradient(direction, reward, torch.zeros(6, 3, 2), distance)
    torch.testing.assert_close(same, direction)
    torch.testing.assert_close(size, reward)


def test_it_is_weighed_scaled_routed_and_gated_as_a_difference_is():
    class Cost(Bright):
        higher_is_better = False

    gate = {"reward": "other", "above": 0.5}
    mix = RewardMix(
        {
            "cost": RewardTerm(Cost(), {0: 1.0, 10: 3.0}, scale=4.0, gate=gate, gradient=True),
            "other": RewardTerm(Bright(), 0),
        }
    )
    routed = torch.tensor([True, True, True, True, False, False])
    own = Scores(torch.zeros(6), routed, routed, torch.tensor([2.0, 2.0, 1.0, 1.0, 0.0, 0.0]))
    other = Scores.of(torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0]))
    pulls = mix.pulls({"cost": torch.ones(6, 2)}, {"cost": own, "other": other}, epoch=5)
    assert pulls["cost"].tolist() == [[-1.0, -1.0]] * 2 + [[0.0, 0.0]] * 4


@pytest.mark.parametrize("lora", [LoRA(rank=2, alpha=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("normalization", ["mean_square", "root_mean_square"])
def test_a_run_learns_by_it(toy_module, fit, lora, normalization):
    recorder = Recorder()
    rewards = {"bright": RewardTerm(Bright(), gradient=True)}
    objective = Objective(normalization=normalization)
    module = toy_module(rewards=rewards, lora=lora, objective=objective, updates_per_epoch=1)
    fit(module, 30, callbacks=[recorder])
    assert recorder.epochs[-1]["reward/bright/mean"] > recorder.epochs[0]["reward/bright/mean"] + 0.1
    assert recorder.epochs[0]["reward/bright/gradient"] > 0
    assert "reward/bright/share" not in recorder.epochs[0]


def test_it_needs_no_pairs_that_differ(toy_module, fit, recwarn):
    recorder = Recorder()
    sampling, objective = Sampling(num_steps=4, height=2, width=2, churn=0.0), Objective(normalization="mean_square")
    options = {"sampling": sampling, "objective": objective, "updates_per_epoch": 1}
    fit(toy_module(rewards={"bright": RewardTerm(Bright(), gradient=True)}, **options), 30, callbacks=[recorder])
    assert recorder.epochs[-1]["reward/bright/mean"] > recorder.epochs[0]["reward/bright/mean"] + 0.1
    assert not [str(one.message) for one in recwarn if "nothing" in str(one.message)]


def test_one_term_by_its_gradient_and_one_by_differences(toy_module, fit):
    """Brighter, and the first pixel's red darker: both rise from where they were."""

    def first_pixel(images, prompts, metadata):
        return -images[:, 0, 0, 0]

    recorder = Recorder()
    rewards = {"bright": RewardTerm(Bright(), 3.0, gradient=True), "first": RewardTerm(first_pixel, 1.0)}
    fit(toy_module(rewards=rewards), 60, callbacks=[recorder])
    for name in ("bright", "first"):
        assert recorder.epochs[-1][f"reward/{name}/mean"] > recorder.epochs[0][f"reward/{name}/mean"] + 0.05


@pytest.mark.parametrize(("prompt", "said"), [("raises", "no gradient"), ("infinite", "not finite")])
def test_a_gradient_that_fails_ends_the_run_or_drops_its_pair(prompt, said):
    rewards = {"failing": RewardTerm(Failing(), gradient=True)}
    with pytest.raises(RewardError, match=rf"pair 1 of epoch 0: .*{said}"):
        roll_out(ToyFlow(), rewards, prompts=("a cat", prompt))
    with pytest.warns(UserWarning, match=f"dropped, with its pair: .*{said}"):
        mix, rollout = roll_out(ToyFlow(), rewards, prompts=("a cat", prompt), drop=True)
    assert rollout.scores["failing"].failed.tolist() == [False, False, True, True] * 2
    pulls = mix.pulls(rollout.gradients, rollout.scores)["failing"]
    assert not pulls[2:4].any()
    assert pulls[:2].all()


def test_a_run_that_drops_pairs_goes_on(toy_module, fit, tmp_path):
    prompts = tmp_path / "infinite.txt"
    prompts.write_text("a cat\nthe dog\ninfinite\nsome bird\n")
    recorder = Recorder()
    module = toy_module(
        rewards={"failing": RewardTerm(Failing(), gradient=True)}, on_reward_error="drop_pair", max_dropped=0.5
    )
    with pytest.warns(UserWarning, match="dropped"):
        fit(module, 20, callbacks=[recorder], train=str(prompts))
    assert recorder.epochs[0]["reward/dropped"] == 0.25
    assert recorder.epochs[-1]["reward/failing/mean"] > recorder.epochs[0]["reward/failing/mean"] + 0.05


def test_a_watched_term_takes_no_gradient(toy_module, fit):
    ends = []
    for gradient in (False, True):
        rewards = {"brightness": RewardTerm(brightness), "watched": RewardTerm(Bright(), 0.0, gradient=gradient)}
        module = toy_module(rewards=rewards)
        fit(module, 2)
        ends.append(trainable(module))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_small_gradients_survive_a_decoder_in_float16():
    class Half(ToyFlow):
        def decode(self, latents):
            return latents.half().sigmoid().float()

    class Faint(Bright):
        def __call__(self, images, prompts, metadata):
            return 1e-6 * super().__call__(images, prompts, metadata)

    exact = roll_out(ToyFlow(), {"faint": RewardTerm(Faint(), gradient=True)})[1].gradients["faint"]
    half = roll_out(Half(), {"faint": RewardTerm(Faint(), gradient=True)})[1].gradients["faint"]
    torch.testing.assert_close(half, exact, rtol=0.01, atol=0)


def test_terms_that_cannot_are_refused():
    with pytest.raises(ConfigurationError, match="JPEGSize is not \\(or does not say so"):
        RewardMix({"small": {"reward": "JPEGSize", "gradient": True}})
    with pytest.raises(ConfigurationError, match="brightness is not"):
        RewardMix({"bright": RewardTerm(brightness, gradient=True)})
    with pytest.raises(ConfigurationError, match="expected no clip with gradient: true, got clip 1"):
        RewardMix({"colours": {"reward": "Colorfulness", "gradient": True, "clip": 1}})
    with pytest.raises(ConfigurationError, match="expected gradient true or false, got gradient 'yes'"):
        RewardMix({"colours": {"reward": "Colorfulness", "gradient": "yes"}})


@pytest.mark.parametrize("objective", [Objective(reward_clip=0.2), Objective(reward_scale="std")])
def test_what_bounds_differences_is_refused_where_none_trains(toy_module, objective):
    bright = RewardTerm(Bright(), gradient=True)
    with pytest.raises(ConfigurationError, match="would have no effect: every reward that trains does so by its gradi"):
        toy_module(rewards={"bright": bright, "watched": RewardTerm(brightness, 0.0)}, objective=objective)
    toy_module(rewards={"bright": bright, "first": RewardTerm(brightness, 0.1)}, objective=objective)
