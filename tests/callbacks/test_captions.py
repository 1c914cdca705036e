"""Captions: what the model was given stands below each image, whatever its language and length."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_fdfo.callbacks import BeforeAfter, SampleStrip
from lightning_fdfo.callbacks.captions import MAX_LINES, caption_font, draw_lines, font_for, wrap
from lightning_fdfo.callbacks.pair_gallery import pair_tile
from lightning_fdfo.callbacks.pictures import image_grid

PROMPTS = [
    '"427" in red',
    "多行文字" * 20,
    "שלום עולם",
    "нарисуй 「число」 «427»",
    "e\u0301 emoji 🎨 \U0001f469\u200d\U0001f52c",
    "half a pair \ud800, a tab\tand\nlines",
    "",
    "word " * 200,
    "nospaces" * 100,
]


@pytest.mark.parametrize("width", [2, 40, 128, 512])
@pytest.mark.parametrize("text", PROMPTS)
def test_any_prompt_is_wrapped_and_drawn_within_its_width(text, width):
    lines = wrap(text, width, 12)
    assert len(lines) <= MAX_LINES
    font = font_for("".join(lines), 12)
    if width > 20:  # narrower, a letter stands alone
        assert all(font.getlength(line) <= width for line in lines)
    said = "".join("".join(lines).split()).removesuffix("…")
    assert "".join(text.encode(errors="replace").decode().split()).startswith(said)
    draw_lines(Image.new("RGB", (width, 60)), (0, 0), lines, 12)


def test_a_prompt_that_fits_is_said_in_full_and_a_longer_one_says_that_it_goes_on():
    assert wrap('the number "427" in red', 128, 11) == ['the number "427" in', "red"]
    assert wrap("word " * 200, 128, 11)[-1].endswith(" …")


def test_the_font_knows_more_than_latin():
    unknown = caption_font(20).getmask("\U0010fffd").getbbox(), bytes(caption_font(20).getmask("\U0010fffd"))
    for letter in "äžλЖש":
        assert (caption_font(20).getmask(letter).getbbox(), bytes(caption_font(20).getmask(letter))) != unknown


def test_each_caption_stands_below_its_image():
    images = torch.full((3, 3, 8, 120), 0.5)
    one = np.asarray(image_grid(images, columns=2, captions=["one", "two", "three " * 9]))
    other = np.asarray(image_grid(images, columns=2, captions=["one", "TWO", "three " * 9]))
    plain = np.asarray(image_grid(images, columns=2))
    changed = np.argwhere((one != other).any(axis=-1))
    assert changed.min(axis=0).tolist() > [10, 124]  # below the second image alone
    assert changed[:, 1].min() > 124
    assert changed[:, 0].max() < 10 + 60
    assert one.shape[1] == plain.shape[1]


def test_pairs_strips_and_grids_take_a_prompt_of_any_language(toy_module, fit, tmp_path):
    prompts = tmp_path / "val.txt"
    prompts.write_text("多行文字\nשלום\n🎨 " + "long " * 50, encoding="utf-8")
    callbacks = [BeforeAfter(num_images=3), SampleStrip(num_images=3)]
    fit(toy_module(), 1, val=str(prompts), callbacks=callbacks, num_sanity_val_steps=-1)
    assert all((tmp_path / name).stat().st_size for name in ("before.png", "after.png", "samples.png"))
    assert pair_tile(torch.rand(2, 3, 4, 8), "多行文字" * 40, {"a": 1.0}).height < 300
