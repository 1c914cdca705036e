"""The quick start as it is shipped: minutes, so on demand with -m slow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from lightning_fdfo.callbacks.pictures import image_grid
from lightning_fdfo.randomness import Stream, generator, stack_normal

ROOT = Path(__file__).parents[2]
PROMPTS = (ROOT / "configs/prompts/digits_heldout.txt").read_text().splitlines()[:24]


@pytest.mark.slow
def test_the_quick_start_gains_fifteen_points(tmp_path):
    command = [sys.executable, "-m", "lightning_fdfo", "fit", "--config", "configs/quickstart.yaml"]
    subprocess.run([*command, f"--trainer.default_root_dir={tmp_path}"], cwd=ROOT, check=True, timeout=1200)
    summary = json.loads((tmp_path / "before_after.json").read_text())
    assert 0.3 <= summary["before"]["exact_match"] <= 0.7
    assert summary["after"]["exact_match"] >= summary["before"]["exact_match"] + 0.15
    with Image.open(tmp_path / "after.png") as ours:
        theirs = image_grid(plain_diffusers(tmp_path / "lora"), columns=6, zoom=2, captions=PROMPTS)
        difference = np.abs(np.asarray(ours.convert("RGB"), dtype=int) - np.asarray(theirs, dtype=int))
    assert difference.max() <= 1  # of 255: rounding


def plain_diffusers(lora):
    """The first 24 held-out prompts, painted by diffusers alone from the run's own validation latents."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        ROOT / "lightning_fdfo/assets/tiny-digits", text_encoder_3=None, tokenizer_3=None
    )
    pipeline.load_lora_weights(lora)
    latents = stack_normal([generator(Stream.VALIDATION, seed=0, index=index) for index in range(24)], 8, 8, 16)
    options = {"height": 32, "width": 64, "num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 0}
    return pipeline(PROMPTS, latents=latents, output_type="pt", **options).images.float()
