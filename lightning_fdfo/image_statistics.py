"""What images look like, in numbers that a reward may spoil while it rises: edges, colours, brightness, fine detail.

Legend: images are [N, 3, H, W] in [0, 1]; each function gives [N], float32, on their device.
Luma is 0.299 red + 0.587 green + 0.114 blue (ITU-R BT.601).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

LUMA = (0.299, 0.587, 0.114)
EDGE = 0.25
"""Slope of luma, per pixel, from which on a pixel counts as an edge's."""
LEVELS = 8
"""Of a channel, in the histogram of colours."""


def luma(images: Tensor) -> Tensor:
    """Brightness of each pixel: [N, H, W] in [0, 1]."""
    return torch.einsum("nchw,c->nhw", images.float(), torch.tensor(LUMA, device=images.device))


def brightness(images: Tensor) -> Tensor:
    """Mean luma, in [0, 1].

    Example:
        >>> brightness(torch.ones(1, 3, 4, 4))
        tensor([1.])
    """
    return luma(images).mean(dim=(1, 2))


def saturation(images: Tensor) -> Tensor:
    """Mean saturation of HSV, (max - min) / max over a pixel's channels and 0 for black, in [0, 1].

    Example:
        >>> red, grey = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.5])
        >>> saturation(torch.stack([red, grey])[:, :, None, None])
        tensor([1., 0.])
    """
    highest, lowest = images.float().amax(dim=1), images.float().amin(dim=1)
    return ((highest - lowest) / highest.clamp(min=1e-6)).mean(dim=(1, 2))


def edge_density(images: Tensor) -> Tensor:
    """Share of pixels at which luma's slope, by Sobel's filters, is above `EDGE` per pixel, in [0, 1].

    Example:
        >>> stripe = torch.zeros(1, 3, 8, 8)
        >>> stripe[..., 4:] = 1  # one edge; the slope reaches into a column on either side
        >>> edge_density(stripe)
        tensor([0.2500])
    """
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device) / 8
    filters = torch.stack([across, across.T])[:, None]
    slopes = conv2d(pad(luma(images)[:, None], (1, 1, 1, 1), mode="replicate"), filters)
    return (slopes.square().sum(dim=1).sqrt() > EDGE).float().mean(dim=(1, 2))


def color_entropy(images: Tensor) -> Tensor:
    """Entropy of the colours' histogram, with `LEVELS` levels a channel, in bits: 0 for one colour, at most 9.

    Example:
        >>> half = torch.zeros(1, 3, 4, 4)
        >>> half[..., 2:] = 1
        >>> color_entropy(half)
        tensor([1.])
    """
    levels = (images.float() * LEVELS).long().clamp(0, LEVELS - 1)
    red, green, blue = levels.flatten(2).unbind(dim=1)
    shares = torch.stack(
        [
            torch.bincount(colors, minlength=LEVELS**3).float() / len(colors)
            for colors in (red * LEVELS + green) * LEVELS + blue
        ]
    )
    bits: Tensor = torch.special.entr(shares).sum(dim=1) / math.log(2)
    return bits


def high_frequency_share(images: Tensor) -> Tensor:
    """Share of luma's power, without its mean, above half of the highest frequency, in [0, 1]; 0 if there is none.

    Frequencies are radii in the plane; the highest along an axis is half a period a pixel.

    Example:
        >>> fine = torch.tensor([0.0, 1.0]).repeat(4).expand(1, 3, 8, 8)
        >>> high_frequency_share(fine)
        tensor([1.])
    """
    values = luma(images)
    power = torch.fft.fft2(values - values.mean(dim=(1, 2), keepdim=True)).abs().square()
    down, across = (torch.fft.fftfreq(size, device=images.device) for size in values.shape[1:])
    high = (down[:, None].square() + across.square()).sqrt() > 0.25
    total = power.sum(dim=(1, 2))
    return torch.where(total > 1e-8 * values[0].numel(), (power * high).sum(dim=(1, 2)) / total.clamp(min=1e-12), 0.0)


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": brightness,
    "color_entropy": color_entropy,
    "edge_density": edge_density,
    "high_frequency_share": high_frequency_share,
    "saturation": saturation,
}


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """All of them, by name: each [N].

    Example:
        >>> sorted(image_statistics(torch.zeros(1, 3, 8, 8)))
        ['brightness', 'color_entropy', 'edge_density', 'high_frequency_share', 'saturation']
    """
    return {name: statistic(images) for name, statistic in STATISTICS.items()}
