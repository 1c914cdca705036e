import numpy as np
import pytest
import torch
from lightning_fdfo_rewards.colorfulness import Colorfulness

from lightning_fdfo.testing import check_reward


def by_hand(pixels):
    """Hasler and Suesstrunk's M^(3), from 8-bit pixels [H, W, 3]."""
    red, green, blue = (pixels[..., channel].astype(float).ravel() for channel in range(3))
    rg, yb = red - green, 0.5 * (red + green) - blue
    return np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)


def test_it_is_the_papers_formula():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    pixels[1] //= 3
    pixels[2, ..., 2] = 0
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    scores = Colorfulness()(images, [""] * 3, [{}] * 3).tolist()
    assert scores == pytest.approx([by_hand(image) for image in pixels], rel=1e-5)
    assert scores[1] < scores[0]


def test_grey_is_nothing_and_its_range_holds():
    grey = torch.linspace(0, 1, 64).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    assert Colorfulness()(grey, [""], [{}]).item() == pytest.approx(0, abs=1e-4)
    half = torch.zeros(1, 3, 8, 8)
    half[:, 0, :4], half[:, 1, 4:] = 1, 1  # red over green: as far apart as rg can be
    assert 200 < Colorfulness()(half, [""], [{}]).item() < Colorfulness.range[1]
    check_reward(Colorfulness())
