import json

import pytest
import torch
from PIL import Image

from lightning_fdfo.callbacks import BeforeAfter, LoRAExport, RewardCurve, image_grid


def test_a_grid_shows_each_image_in_its_place():
    images = torch.stack([torch.full((3, 2, 4), value) for value in (0.0, 0.5, 1.0)])
    grid = image_grid(images, columns=2, zoom=3, gap=1)
    assert grid.size == (2 * 13 + 1, 2 * 7 + 1)
    assert [grid.getpixel(at)[0] for at in ((1, 1), (14, 1), (1, 8), (14, 8), (0, 0))] == [0, 128, 255, 128, 128]


def test_a_run_leaves_pictures_curve_and_table(toy_module, fit, tmp_path, capsys):
    prompts = tmp_path / "val.txt"
    prompts.write_text("x\ny\nz\n")
    callbacks = [BeforeAfter(num_images=2, columns=2, zoom=1), RewardCurve()]
    fit(toy_module(), 3, val=str(prompts), callbacks=callbacks, num_sanity_val_steps=-1)
    summary = json.loads((tmp_path / "before_after.json").read_text())
    assert summary["after_epoch"] == 3
    assert set(summary["before"]) == set(summary["after"]) == {"reward", "brightness"}
    assert summary["before"] != summary["after"]
    for name, size in (("before.png", (10, 6)), ("after.png", (10, 6)), ("reward_curve.png", (720, 420))):
        with Image.open(tmp_path / name) as image:
            assert image.size == size
    printed = capsys.readouterr().out
    assert "after epoch 3" in printed
    assert f"{summary['after']['reward']:.4f}" in printed
    assert len(callbacks[1].rollouts) == 3
    assert [epoch for epoch, _ in callbacks[1].validations] == [0, 1, 2, 3]


def test_the_state_goes_through_a_checkpoint():
    before = BeforeAfter()
    before.load_state_dict({"before": {"reward": 1.0}, "after": {}, "after_epoch": 0})
    assert before.state_dict() == {"before": {"reward": 1.0}, "after": {}, "after_epoch": 0}


def test_without_a_lora_there_is_nothing_to_export(toy_module, fit):
    with pytest.raises(TypeError, match="trains a LoRA"):
        fit(toy_module(lora=None), 1, callbacks=[LoRAExport()])
