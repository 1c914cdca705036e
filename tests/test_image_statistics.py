"""Against numpy, Pillow and colorsys, on images that differ in what each measures."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import ndimage, stats

from lightning_fdfo.image_statistics import EDGE, LEVELS, STATISTICS, image_statistics


@pytest.fixture(scope="module")
def images():
    noise = torch.rand(3, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise, noise * 0.1, noise.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)])


def pixels(images):
    return images.permute(0, 2, 3, 1).double().numpy()


def luma(image):
    return image @ [0.299, 0.587, 0.114]


def sobel(image):
    return np.hypot(*(ndimage.sobel(luma(image), axis, mode="nearest") / 8 for axis in (0, 1)))


def entropy(image):
    levels = np.minimum((image * LEVELS).astype(int), LEVELS - 1).reshape(-1, 3)
    return stats.entropy(np.unique(levels, axis=0, return_counts=True)[1], base=2)


def high(image):
    power = abs(np.fft.fft2(luma(image) - luma(image).mean())) ** 2
    radius = np.hypot(*np.meshgrid(*(np.fft.fftfreq(size) for size in power.shape), indexing="ij"))
    return power[radius > 0.25].sum() / power.sum()


BY_HAND = {
    "brightness": lambda image: luma(image).mean(),
    "saturation": lambda image: np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.reshape(-1, 3)]),
    "edge_density": lambda image: (sobel(image) > EDGE).mean(),
    "color_entropy": entropy,
    "high_frequency_share": high,
}


@pytest.mark.parametrize("name", STATISTICS)
def test_against_values_by_hand(images, name):
    ours = STATISTICS[name](images)
    assert ours.dtype == torch.float32
    expected = torch.tensor([BY_HAND[name](image) for image in pixels(images)])
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    assert len(set(expected.tolist())) > 2


def test_blurred_images_have_less_fine_detail_and_fewer_edges():
    sharp = Image.effect_noise((64, 64), 200).convert("RGB")
    blurred = sharp.filter(ImageFilter.GaussianBlur(2))
    both = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in (sharp, blurred)])
    seen = image_statistics(both)
    assert seen["high_frequency_share"][1] < 0.1 < 0.5 < seen["high_frequency_share"][0]
    assert seen["edge_density"][1] < seen["edge_density"][0]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_plain_image_has_numbers_too(value):
    seen = image_statistics(torch.full((2, 3, 9, 7), value))
    assert all(bool(score.isfinite().all()) for score in seen.values())
    assert seen["color_entropy"].tolist() == seen["edge_density"].tolist() == seen["high_frequency_share"].tolist()
    assert seen["brightness"].tolist() == pytest.approx([value, value])
