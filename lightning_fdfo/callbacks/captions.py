"""Captions: the prompt below each image of a picture, in a font that knows more than Latin letters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

INK = "#222222"
PAPER = "white"
MAX_LINES = 3
"""Of a caption; what does not fit ends in an ellipsis."""
EAST_ASIAN = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "msyh.ttc", "PingFang.ttc", "ARIALUNI.TTF")
"""Fonts that are tried for Chinese, Japanese and Korean, which DejaVu Sans lacks: those that systems bring."""

_Font = ImageFont.FreeTypeFont


@cache
def caption_font(size: int, east_asian: bool = False) -> _Font:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic and more.

    Args:
        size: pixels, at least 1.
        east_asian: prefers a font of `EAST_ASIAN`, if the system has one; without, such characters are drawn as boxes.
    """
    for name in EAST_ASIAN if east_asian else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:  # not installed
            continue
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def font_for(text: str, size: int) -> _Font:
    """The font that a text is drawn in."""
    return caption_font(size, any("\u2e80" <= character < "\ufb00" for character in text))


def caption_size(width: int) -> int:
    """Height of a caption's letters below an image of some width, pixels: they stay legible in a grid that is shrunk.

    Example:
        >>> caption_size(128), caption_size(1024)
        (11, 56)
    """
    return max(11, width // 18)


def wrap(text: str, width: int, size: int, max_lines: int = MAX_LINES) -> list[str]:
    """A text in lines that fit, broken at spaces where there are any; a text that is too long ends in an ellipsis.

    Args:
        text: on one line or several.
        width: pixels.
        size: of the letters, pixels.
        max_lines: at least 1.

    Example:
        >>> wrap('the number "427" in red', 90, 11)
        ['the number', '"427" in red']
    """
    rest = " ".join(text.encode(errors="replace").decode().split())
    font = font_for(rest, size)
    lines: list[str] = []
    while rest and len(lines) < max_lines:
        count = _fitting(rest, width, font)
        if count < len(rest) and len(lines) + 1 == max_lines:
            count = _fitting(rest, width - round(font.getlength(" …")), font)
            lines.append(rest[:count].rstrip() + " …")
            break
        if count < len(rest) and (space := rest.rfind(" ", 0, count + 1)) > 0:
            count = space
        lines.append(rest[:count].rstrip())
        rest = rest[count:].lstrip()
    return lines


def _fitting(text: str, width: int, font: _Font) -> int:
    """How many of a text's first characters fit, at least one."""
    low, high = 1, min(len(text), max(1, width))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def line_height(size: int) -> int:
    """From a line's top to the next, pixels."""
    return round(1.35 * size)


def draw_lines(sheet: Image.Image, corner: tuple[int, int], lines: Sequence[str], size: int) -> None:
    """Draws lines of text, left-aligned, below a corner's point."""
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        draw.text((corner[0], corner[1] + row * line_height(size)), line, fill=INK, font=font_for(line, size))
