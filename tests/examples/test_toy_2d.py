"""The flow in the plane: its closed form is right, FDFO's secants are the gradient, and training moves the samples."""

import doctest
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_fdfo.sampling import sample

ROOT = Path(__file__).parents[2]


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples/toy_2d")
    import toy_2d

    return toy_2d


def normal(num, seed=0):
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))


def test_the_velocity_is_the_mean_of_noise_minus_image(toy):
    """Importance sampling of E[noise - x0 | x] at a few points, from a million draws of x0."""
    generator = torch.Generator().manual_seed(0)
    images = toy.MEANS[torch.randint(len(toy.MEANS), (1_000_000,), generator=generator)]
    images = images + toy.STD * torch.randn(images.shape, generator=generator)
    for sigma, place in ((0.3, (1.0, 0.4)), (0.6, (-0.5, 0.2)), (0.9, (0.3, -1.0))):
        x = torch.tensor([place])
        noise = (x - (1 - sigma) * images) / sigma
        weight = (-noise.square().sum(dim=1) / 2).softmax(dim=0)[:, None]
        expected = (weight * (noise - images)).sum(dim=0)
        torch.testing.assert_close(
            toy.mixture_velocity(x, torch.tensor(sigma))[0], expected, rtol=0.02, atol=0.02, msg=f"{sigma=}"
        )


def test_its_example_holds(toy):
    done = doctest.testmod(toy)
    assert done.attempted
    assert not done.failed


def test_it_paints_the_mixture(toy):
    """All modes alike, each as wide as it is."""
    ends = sample(toy.mixture_velocity, normal(4000), toy.uniform_sigmas(200))
    distances, nearest = torch.cdist(ends, toy.MEANS).min(dim=1)
    assert (nearest.bincount(minlength=5) / 4000 - 0.2).abs().max() < 0.02
    near = distances[distances < 4 * toy.STD]
    assert len(near) > 0.98 * 4000
    assert near.square().mean().div(2).sqrt().item() == pytest.approx(toy.STD, rel=0.1)


def test_the_known_gradient_is_the_rewards(toy):
    x = normal(5).requires_grad_()
    (expected,) = torch.autograd.grad(toy.reward(x).sum(), x)
    torch.testing.assert_close(toy.reward_gradient(x.detach()), expected)


def test_secants_average_to_the_gradient(toy):
    """Per set of initial latents, the mean over pairs against the gradient's mean at the same pairs' ends."""
    flow, latents = toy.PlaneFlow(), normal(200, seed=1)
    estimate, gradient = toy.secant_gradients(flow, latents, pairs_each=256)
    cosine = torch.cosine_similarity(estimate, gradient, dim=1)
    assert cosine.mean() > 0.96  # 0.985
    assert cosine.min() > 0.8  # 0.915
    assert torch.cosine_similarity(estimate.flatten(), gradient.flatten(), dim=0) > 0.9  # sizes count: 0.97
    one, gradient = toy.secant_gradients(flow, normal(2000, seed=1), pairs_each=1)
    alone = torch.cosine_similarity(one, gradient, dim=1).mean().item()
    assert 0.4 < alone < 2 / math.pi + 0.02  # 0.55: a pair knows one line only


def test_the_pull_is_the_secant_at_each_step(toy):
    """Descent's push of the image: (2 / N) * reward_difference * direction, with N = 2 numbers."""
    latents = normal(3, seed=1)
    paths, pulls = toy.pull(toy.PlaneFlow(), latents, pairs_each=64)
    estimate, _ = toy.secant_gradients(toy.PlaneFlow(), latents, pairs_each=64)
    assert paths.shape == (3, 21, 2)
    assert torch.equal(paths[:, 0], latents)
    torch.testing.assert_close(pulls, estimate[:, None].expand(3, 20, 2))


@pytest.mark.parametrize("sign", [1, -1])
def test_training_moves_samples_to_the_rewarded_mode(toy, monkeypatch, sign):
    hill = toy.reward
    monkeypatch.setattr(toy, "reward", lambda x: sign * hill(x))
    latents, flow = normal(1000, seed=1), toy.PlaneFlow()
    with torch.no_grad():
        before = sample(flow, latents, toy.SIGMAS)
    toy.train(flow)
    with torch.no_grad():
        after = sample(flow, latents, toy.SIGMAS)
    assert 0.15 < toy.share_at_rewarded_mode(before) < 0.25  # one of five
    if sign == 1:
        assert toy.share_at_rewarded_mode(after) > 0.8  # 0.92
        assert hill(after).mean() > hill(before).mean() + 0.3  # 0.47 to 0.97
    else:
        assert toy.share_at_rewarded_mode(after) < 0.05


def test_the_script_draws(tmp_path):
    target = tmp_path / "toy.png"
    done = subprocess.run(
        [sys.executable, "examples/toy_2d/toy_2d.py", target], cwd=ROOT, check=True, capture_output=True, text=True
    )
    with Image.open(target) as ours, Image.open(ROOT / "docs/images/toy_2d.png") as shipped:
        assert ours.size == shipped.size
    told = [re.search(rf"{name}: (\d+) % .* (\d\.\d\d)$", done.stdout, re.MULTILINE) for name in ("before", "after")]
    (share, reward), (share_after, reward_after) = (found.groups() for found in told)
    readme = (ROOT / "examples/toy_2d/README.md").read_text()
    assert f"| samples at the rewarded mode | {share} % | {share_after} % |" in readme
    assert f"| mean reward, 1 at most | {reward} | {reward_after} |" in readme
