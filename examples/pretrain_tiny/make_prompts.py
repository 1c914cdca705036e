"""Writes the prompt files of the quick start: training numbers, and numbers that 7 divides, which are held out.

python examples/pretrain_tiny/make_prompts.py configs/prompts
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from digits import COLORS, draw_number, prompt_of


def distinct_prompts(count: int, seed: int, *, held_out: bool) -> list[str]:
    """`count` different prompts."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[prompt_of(draw_number(rng, held_out=held_out), str(rng.choice(list(COLORS))))] = None
    return list(prompts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for name, count, held_out in (("digits_train.txt", 2048, False), ("digits_heldout.txt", 256, True)):
        lines = distinct_prompts(count, seed=0, held_out=held_out)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
