"""A layered graph as SVG: boxes on floors, arrows from upper floors to lower ones, none through a box."""

from __future__ import annotations

import textwrap
from html import escape
from itertools import pairwise

WIDTH, BOX, LANE, GAP, ROW, FLOOR = 1040, 208, 18, 14, 15, 52
"""Pixels: the picture, a box, an arrow that passes a floor, between two of these, a line of text, between floors."""
STYLE = """
text { font: 12px sans-serif; fill: #24292f; text-anchor: middle }
.name { font: bold 14px monospace }
rect { fill: #f3f6fa; stroke: #5b7083 }
path { fill: none; stroke: #5b7083; stroke-width: 1.4; marker-end: url(#head) }
"""
HEAD = (
    '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<polygon points="0,0 8,4 0,8" fill="#5b7083"/></marker>'
)
Slot = tuple[str, str]
"""A box (its name twice), or the place where an arrow (its two ends) passes a floor."""


def draw(floors: list[dict[str, str]], arrows: set[tuple[str, str]]) -> str:
    """The picture.

    Args:
        floors: from the top, each with its boxes: name and text. The last one is a single box, as wide as the picture.
        arrows: from a box to one on a lower floor.
    """
    level = {name: number for number, floor in enumerate(floors) for name in floor}
    rows: list[list[Slot]] = [[(name, name) for name in floor] for floor in floors]
    for one, other in sorted(arrows):
        for number in range(level[one] + 1, level[other]):
            rows[number].append((one, other))
    _untangle(rows, level, arrows)
    centre = [_places(row, wide=number == len(rows) - 1) for number, row in enumerate(rows)]
    texts = {
        name: textwrap.wrap(text, 140 if floor is floors[-1] else 29)
        for floor in floors
        for name, text in floor.items()
    }
    heights = [30 + ROW * max(len(texts[name]) for name in floor) for floor in floors]
    tops = [8 + sum(heights[:number]) + number * FLOOR for number in range(len(floors))]
    lines = []
    for one, other in sorted(arrows):
        start, end = level[one], level[other]
        last = (
            centre[end][other, other]
            if end < len(rows) - 1
            else centre[end - 1][one, one if end - 1 == start else other]
        )
        ways = [centre[number][one, other] for number in range(start + 1, end)]
        lines.append(_arrow([centre[start][one, one], *ways, last], tops[start : end + 1], heights[start : end + 1]))
    for number, floor in enumerate(floors):
        width = WIDTH - 16 if number == len(rows) - 1 else BOX
        for name in floor:
            lines += _box(name, texts[name], centre[number][name, name], tops[number], width, heights[number])
    height = tops[-1] + heights[-1] + 8
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    paper = f'<path d="M0 0H{WIDTH}V{height}H0Z" style="fill:white;stroke:none;marker-end:none"/>'
    return "\n".join([head, f"<style>{STYLE}</style><defs>{HEAD}</defs>", paper, *lines, "</svg>", ""])


def _untangle(rows: list[list[Slot]], level: dict[str, int], arrows: set[tuple[str, str]]) -> None:
    """Sorts each row by where its slots' arrows come from, then by where they go, a few times."""
    downward = [(number, number - 1) for number in range(1, len(rows))]
    upward = [(number, number + 1) for number in range(len(rows) - 2, -1, -1)]
    for number, other in 4 * (downward + upward):
        own, theirs = _places(rows[number], wide=False), _places(rows[other], wide=False)
        ends: dict[Slot, list[float]] = {slot: [] for slot in own}
        for arrow in sorted(arrows):
            here, there = _slot(arrow, level, number), _slot(arrow, level, other)
            if here is not None and there is not None:
                ends[here].append(theirs[there])
        aims = {slot: sum(xs) / len(xs) if xs else own[slot] for slot, xs in ends.items()}
        rows[number].sort(key=aims.__getitem__)


def _slot(arrow: tuple[str, str], level: dict[str, int], number: int) -> Slot | None:
    """Where an arrow is on a floor: at one of its boxes, on its way past, or nowhere."""
    for end in arrow:
        if number == level[end]:
            return (end, end)
    return arrow if level[arrow[0]] < number < level[arrow[1]] else None


def _places(row: list[Slot], *, wide: bool) -> dict[Slot, float]:
    """Centre of each slot of a row, the row in the middle of the picture, pixels."""
    if wide:
        return {row[0]: WIDTH / 2}
    widths = [BOX if one == other else LANE for one, other in row]
    left = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2
    places = {}
    for slot, width in zip(row, widths, strict=True):
        places[slot] = left + width / 2
        left += width + GAP
    return places


def _arrow(xs: list[float], tops: list[int], heights: list[int]) -> str:
    """From below the first box, straight past the boxes between, to the top of the last."""
    path = f"M{xs[0]:.0f} {tops[0] + heights[0]}"
    for number, (x, after) in enumerate(pairwise(xs)):
        y, end = tops[number] + heights[number], tops[number + 1]
        middle = (y + end) / 2
        path += f"C{x:.0f} {middle:.0f} {after:.0f} {middle:.0f} {after:.0f} {end}"
        if number + 2 < len(xs):
            path += f"V{end + heights[number + 1]}"
    return f'<path d="{path}"/>'


def _box(name: str, text: list[str], centre: float, top: int, width: int, height: int) -> list[str]:
    lines = [f'<rect x="{centre - width / 2:.0f}" y="{top}" width="{width}" height="{height}" rx="5"/>']
    lines.append(f'<text class="name" x="{centre:.0f}" y="{top + 18}">{escape(name)}</text>')
    for number, line in enumerate(text):
        lines.append(f'<text x="{centre:.0f}" y="{top + 35 + ROW * number}">{escape(line)}</text>')
    return lines
