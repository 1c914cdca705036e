"""Images as one picture."""

from __future__ import annotations

from PIL import Image
from torch import Tensor


def image_grid(images: Tensor, columns: int, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Images side by side, in rows.

    Args:
        images: [N, 3, H, W] in [0, 1].
        columns: images a row.
        zoom: pixels a pixel, >= 1.
        gap: pixels of grey between images.

    Example:
        >>> import torch
        >>> image_grid(torch.ones(3, 3, 8, 16), columns=2).size
        (38, 22)
    """
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = Image.new(
        "RGB",
        ((columns * (width * zoom + gap) + gap), rows * (height * zoom + gap) + gap),
        (128, 128, 128),
    )
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, pixel in enumerate(pixels):
        row, column = divmod(index, columns)
        tile = Image.fromarray(pixel).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + column * (width * zoom + gap), gap + row * (height * zoom + gap)))
    return sheet
