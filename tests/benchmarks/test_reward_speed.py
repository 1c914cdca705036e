"""Images a second of the rewards that cost the CPU something: pytest -m benchmark -s tests/benchmarks.

Prints ratios within one run; nothing is held to a time, because machines differ.
"""

import time

import pytest
import torch

from lightning_fdfo import RewardMix
from tests.rewards.test_ocr import picture

pytestmark = pytest.mark.benchmark

WORDS = ["427", "12", "HELLO", "open", "903", "Sale"]


def images_per_second(spec, images, prompts):
    """The best of three, after a first call that loads."""
    mix = RewardMix({"reward": {"reward": spec}})
    mix.setup(torch.device("cpu"))
    mix(images[:8], prompts[:8], [{}] * 8)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        mix(images, prompts, [{}] * len(images))
        times.append(time.perf_counter() - start)
    return len(images) / min(times)


def test_speed():
    words = [WORDS[i % len(WORDS)] for i in range(256)]
    images = torch.stack([picture(word, height=64, width=64, size=16) for word in words])
    prompts = [f'"{word}"' for word in words]
    specs = {
        "OCR, 32 lines a forward": {"class_path": "OCR"},
        "OCR, one line per forward": {"class_path": "OCR", "init_args": {"batch_size": 1}},
        "OCR with detection": {"class_path": "OCR", "init_args": {"detect": True}},
        "JPEGSize": "JPEGSize",
        "Colorfulness": "Colorfulness",
    }
    speeds = {name: images_per_second(spec, images, prompts) for name, spec in specs.items()}
    first = next(iter(speeds.values()))
    print()
    for name, speed in speeds.items():
        print(f"{name:28} {speed:9.0f} images/s of 64 px, {speed / first:7.2f} x")
