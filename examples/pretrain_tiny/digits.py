"""Pictures of numbers, drawn with a font: what the small model learns to generate.

The pictures are 32 x 64 pixels, a number of two to four digits in one of four colours on white. Size and
place vary a little, so that one prompt has many right pictures. The font is DejaVu Sans Bold as matplotlib
ships it (a free licence of the Bitstream Vera kind, https://dejavu-fonts.github.io/License.html).

Numbers that 7 divides are never drawn for training: they are held out, and the quick start is evaluated on them.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT, WIDTH = 32, 64
COLORS = {"red": (214, 40, 40), "green": (30, 140, 60), "blue": (40, 80, 210), "purple": (140, 50, 170)}
LENGTHS, LENGTH_SHARES = (2, 3, 4), (0.2, 0.4, 0.4)
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"


def is_held_out(number: str) -> bool:
    """Whether a number is kept from training: 7 divides it."""
    return int(number) % 7 == 0


def draw_number(rng: np.random.Generator, *, held_out: bool = False) -> str:
    """A number of two to four digits, as text, from the training numbers or from those held out."""
    while True:
        length = int(rng.choice(LENGTHS, p=LENGTH_SHARES))
        number = str(rng.integers(10 ** (length - 1), 10**length))
        if is_held_out(number) == held_out:
            return number


def prompt_of(number: str, color: str) -> str:
    """The prompt that names a picture.

    Example:
        >>> prompt_of("427", "red")
        '"427" in red'
    """
    return f'"{number}" in {color}'


def draw(number: str, color: str, rng: np.random.Generator) -> np.ndarray:
    """Draws a number; returns uint8 [32, 64, 3]."""
    size = int(rng.integers(18, 22))
    font = ImageFont.truetype(str(FONT), size)
    left, top, right, bottom = font.getbbox(number)
    free_x, free_y = WIDTH - (right - left), HEIGHT - (bottom - top)
    x = free_x / 2 + rng.uniform(-1, 1) * min(4, max(free_x / 2 - 1, 0))
    y = free_y / 2 + rng.uniform(-1, 1) * 3
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    ImageDraw.Draw(image).text((x - left, y - top), number, font=font, fill=COLORS[color])
    return np.asarray(image)


def draw_many(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Draws training pictures; returns uint8 [count, 32, 64, 3] and their prompts."""
    rng = np.random.default_rng(seed)
    images, prompts = np.empty((count, HEIGHT, WIDTH, 3), dtype=np.uint8), []
    for index in range(count):
        number, color = draw_number(rng), str(rng.choice(list(COLORS)))
        images[index] = draw(number, color, rng)
        prompts.append(prompt_of(number, color))
    return images, prompts
