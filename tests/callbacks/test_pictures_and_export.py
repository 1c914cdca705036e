import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from lightning_fdfo.callbacks import BeforeAfter, Curves, LoRAExport
from lightning_fdfo.callbacks.captions import caption_size, line_height
from lightning_fdfo.callbacks.pictures import image_grid
from lightning_fdfo.errors import ConfigurationError


def test_a_grid_shows_each_image_in_its_place():
    images = torch.stack([torch.full((3, 2, 4), value) for value in (0.0, 0.5, 1.0)])
    grid = image_grid(images, columns=2, zoom=3, gap=1)
    assert grid.size == (2 * 13 + 1, 2 * 7 + 1)
    assert [grid.getpixel(at)[0] for at in ((1, 1), (14, 1), (1, 8), (14, 8), (0, 0))] == [0, 128, 255, 128, 128]


FOOT = line_height(caption_size(4)) + 4
"""Pixels of a caption of one line below an image 4 pixels wide."""


def test_a_run_leaves_pictures_curve_and_table(toy_module, fit, tmp_path, capsys):
    prompts = tmp_path / "val.txt"
    prompts.write_text("x\ny\nz\n")
    callbacks = [BeforeAfter(num_images=2, columns=2, zoom=1), Curves()]
    fit(toy_module(), 3, val=str(prompts), callbacks=callbacks, num_sanity_val_steps=-1)
    summary = json.loads((tmp_path / "before_after.json").read_text())
    assert summary["after_epoch"] == 3
    assert set(summary["before"]) == set(summary["after"]) == {"reward", "brightness"}
    assert summary["before"] != summary["after"]
    for name, size in (("before.png", (10, 6 + FOOT)), ("after.png", (10, 6 + FOOT)), ("reward_curve.png", (720, 420))):
        with Image.open(tmp_path / name) as image:
            assert image.size == size
    printed = capsys.readouterr().out
    assert "after epoch 3" in printed
    assert f"{summary['after']['reward']:.4f}" in printed
    assert len(callbacks[1].history["reward/mean"]) == 3
    assert [epoch for epoch, _ in callbacks[1].history["val/reward"]] == [0, 1, 2, 3]


def test_a_resumed_run_still_compares_with_the_base_and_draws_the_whole_curve(toy_module, fit, tmp_path):
    prompts = tmp_path / "val.txt"
    prompts.write_text("x\ny\nz\n")
    seen = []
    for epochs, ckpt_path in ((2, None), (4, "last")):
        saved = ModelCheckpoint(tmp_path / "c", every_n_epochs=1, save_on_train_epoch_end=True, save_last=True)
        callbacks = [saved, BeforeAfter(), Curves()]
        options = {"callbacks": callbacks, "enable_checkpointing": True, "num_sanity_val_steps": -1}
        fit(toy_module(), epochs, ckpt_path, val=str(prompts), **options)
        seen.append(callbacks)
    assert seen[1][1].before == seen[0][1].before
    assert seen[1][1].after_epoch == 4
    assert [epoch for epoch, _ in seen[1][2].history["reward/mean"]] == [1, 2, 3, 4]
    assert [epoch for epoch, _ in seen[1][2].history["val/reward"]] == [0, 1, 2, 3, 4]
    assert seen[1][2].history["reward/mean"][:2] == seen[0][2].history["reward/mean"]


def test_without_a_sanity_check_there_is_no_before(toy_module, fit, tmp_path, capsys):
    prompts = tmp_path / "val.txt"
    prompts.write_text("x\n")
    fit(toy_module(), 1, val=str(prompts), callbacks=[BeforeAfter()], num_sanity_val_steps=0)
    assert not (tmp_path / "before.png").exists()
    assert (tmp_path / "after.png").exists()
    assert "before" not in capsys.readouterr().out


def test_without_a_lora_there_is_nothing_to_export(toy_module, fit):
    with pytest.raises(ConfigurationError, match="trains a LoRA"):
        fit(toy_module(lora=None), 1, callbacks=[LoRAExport()])
