"""Pixels against Pillow's and transformers' own."""

import math

import numpy as np
import pytest
import torch
from lightning_fdfo_rewards.preprocessing import crop_to_square, normalize, pad_to_square
from PIL import Image
from transformers import CLIPImageProcessorPil

SIZES = [(64, 64), (300, 200), (97, 451), (30, 41), (224, 224), (225, 224), (224, 227), (512, 384)]


def smooth(height, width):
    """An image without overshoot, in 8 bits: [1, 3, height, width]."""
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(height * width))
    image = torch.nn.functional.interpolate(0.1 + 0.8 * coarse, (height, width), mode="bilinear", align_corners=True)
    return (image * 255).round() / 255


def pillow(image):
    return Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_cropping_is_what_transformers_does(height, width):
    image = smooth(height, width)
    expected = CLIPImageProcessorPil()(pillow(image), return_tensors="pt").pixel_values
    own = normalize(crop_to_square(image, 224))
    assert own.shape == (1, 3, 224, 224)
    assert (own - expected).abs().max() < 1.1 / 255 / 0.26  # a level of 8 bits


@pytest.mark.parametrize(("height", "width"), [(225, 224), (227, 224), (224, 229)])
def test_the_crops_corner_can_be_rounded_as_torchvision_does(height, width):
    image = smooth(height, width)
    top, left = round((height - 224) / 2), round((width - 224) / 2)  # Python's, to even
    assert torch.equal(crop_to_square(image, 224, rounding=round), image[..., top : top + 224, left : left + 224])
    top, left = math.floor((height - 224) / 2), math.floor((width - 224) / 2)
    assert torch.equal(crop_to_square(image, 224), image[..., top : top + 224, left : left + 224])


@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if size != (224, 224)])
def test_padding_keeps_the_whole_image_in_the_middle(height, width):
    image = smooth(height, width)
    own = pad_to_square(image, 224)
    scale = 224 / max(height, width)
    inner_height, inner_width = round(height * scale), round(width * scale)
    top, left = (224 - inner_height) // 2, (224 - inner_width) // 2
    inner = own[..., top : top + inner_height, left : left + inner_width]
    expected = pillow(image).resize((inner_width, inner_height), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)[None] / 255
    assert (inner - expected).abs().max() < 1.1 / 255
    assert own.sum() == pytest.approx(inner.sum().item(), rel=1e-6)  # all around it is black


def test_overshoot_is_cut_in_a_crop_and_kept_in_a_pad():
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1
    assert crop_to_square(edge, 64).max() == 1
    assert pad_to_square(edge, 64).max() > 1.01
