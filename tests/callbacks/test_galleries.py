"""Pictures of pairs and of validations: what stands where, and when they are written."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_fdfo.callbacks import Curves, PairGallery, SampleStrip
from lightning_fdfo.callbacks.captions import caption_size, line_height
from lightning_fdfo.callbacks.curves import PANELS, curves
from lightning_fdfo.callbacks.pair_gallery import FRAME, WINNER, caption, pair_tile, spread
from lightning_fdfo.callbacks.pictures import image_grid
from lightning_fdfo.callbacks.sample_strip import MARGIN, strip
from lightning_fdfo.errors import ConfigurationError

GREEN = ImageColor.getrgb(WINNER)


@pytest.mark.parametrize(
    ("parts", "framed"), [({"a": 1.0, "b": -0.4}, 0), ({"a": 1.0, "b": -1.4}, 1), ({"a": 0.0}, None)]
)
def test_the_winner_is_framed(parts, framed):
    images = torch.stack([torch.zeros(3, 4, 160), torch.ones(3, 4, 160)])
    tile = pair_tile(images, "a prompt", parts)
    half = tile.width // 2
    assert tile.getpixel((FRAME, FRAME)) == (0, 0, 0)
    assert tile.getpixel((half + FRAME, FRAME)) == (255, 255, 255)
    corners = [tile.getpixel((place * half, 0)) == GREEN for place in (0, 1)]
    assert corners == [framed == 0, framed == 1]


def test_small_images_are_enlarged_and_long_prompts_are_cut():
    tile = pair_tile(torch.rand(2, 3, 4, 8), "word " * 100, {"a": 1.0})
    assert 320 <= tile.width <= 360
    assert tile.height < 300


def test_shares_are_of_all_that_pulls():
    assert caption({"a": 0.3, "b": -0.1, "watched": 0.0}) == ["a  +0.3  75 %", "b  -0.1  25 %"]
    assert caption({"a": 0.0}) == ["a tie"]


def test_pairs_are_spread_from_the_largest_difference_to_the_smallest():
    values = torch.tensor([1.0, 9.0, 5.0, 3.0, 7.0])
    assert values[spread(values, 3)].tolist() == [9, 5, 1]
    assert values[spread(values, 99)].tolist() == [9, 7, 5, 3, 1]
    assert spread(values, 1).tolist() == [1]


class Album(Logger):
    """A logger that takes images."""

    name, version = "album", 0

    def __init__(self):
        super().__init__()
        self.images = []

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params): ...

    def log_image(self, key, images, step):
        self.images.append((key, images[0].size, step))


def test_a_gallery_every_so_many_epochs_in_the_folder_and_in_loggers(toy_module, fit, tmp_path):
    album, board = Album(), TensorBoardLogger(tmp_path, name="", version="")
    gallery = PairGallery(every_n_epochs=2, num_pairs=5, columns=3)
    fit(toy_module(), 3, callbacks=[gallery], logger=[album, board])
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == ["epoch=000.png", "epoch=002.png"]
    with Image.open(tmp_path / "pairs/epoch=000.png") as picture:
        assert album.images == [("pairs", picture.size, 1), ("pairs", picture.size, 5)]
        green = (np.asarray(picture.convert("RGB")) == GREEN).all(axis=-1)
    assert green.any()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Images("pairs")] == [1, 5]


def test_pictures_stand_at_a_step_of_numbers_also_after_a_resume(toy_module, fit, tmp_path):
    """Two updates per epoch: numbers stand at steps 1, 3, 5 and 7, and so does each picture."""
    prompts = tmp_path / "val.txt"
    prompts.write_text("x\ny\nz\n")
    for epochs, ckpt_path in ((2, None), (4, "last")):
        saving = ModelCheckpoint(tmp_path / "c", every_n_epochs=1, save_on_train_epoch_end=True, save_last=True)
        pictures = [SampleStrip(num_images=3, columns=2, rows=3), PairGallery(every_n_epochs=1), Curves()]
        board = TensorBoardLogger(tmp_path, name="", version="")
        options = {"callbacks": [saving, *pictures], "enable_checkpointing": True, "num_sanity_val_steps": -1}
        fit(toy_module(), epochs, ckpt_path, val=str(prompts), logger=board, **options)
    events = EventAccumulator(str(tmp_path), {"images": 0}).Reload()
    steps = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert steps == {
        "samples/before": [1],
        "samples": [1, 3, 5, 7],
        "pairs": [1, 3, 5, 7],
        "reward_curve": [3, 7],
        "curves": [3, 7],
    }
    for number in ("reward/mean", "val/brightness"):
        assert [event.step for event in events.Scalars(number)] == [1, 3, 5, 7], number


def test_a_gallery_changes_nothing_of_a_run(toy_module, fit, weights):
    plain, watched = toy_module(), toy_module()
    fit(plain, 2)
    fit(watched, 2, callbacks=[PairGallery(every_n_epochs=1)])
    one, other = weights(plain), weights(watched)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_strip_has_a_column_an_epoch_and_grows_after_a_resume(toy_module, fit, tmp_path):
    prompts = tmp_path / "val.txt"
    prompts.write_text("x\ny\nz\n")
    for epochs, ckpt_path in ((1, None), (2, "last")):
        saving = ModelCheckpoint(tmp_path / "c", every_n_epochs=1, save_on_train_epoch_end=True, save_last=True)
        callbacks = [saving, SampleStrip(num_images=3, columns=2, rows=3)]
        options = {"callbacks": callbacks, "enable_checkpointing": True, "num_sanity_val_steps": -1}
        fit(toy_module(), epochs, ckpt_path, val=str(prompts), **options)
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["epoch=000.png", "epoch=001.png", "epoch=002.png"]
    with Image.open(tmp_path / "samples.png") as whole:
        assert whole.size == (MARGIN + 3 * 4 + 2, line_height(caption_size(2)) + 2 + 3 * 4)


def test_each_image_of_a_strip_stands_in_its_place(tmp_path):
    shades = torch.tensor([[20, 60, 80, 100], [120, 140, 160, 180]]) / 255
    prompts = ["a", "b", "c", "d e f g h"]
    for epoch, row, captions in zip((3, 12), shades, (None, prompts), strict=True):  # older grids have no captions
        grid = image_grid(row.view(4, 1, 1, 1).expand(-1, 3, 6, 10), columns=3, captions=captions)
        grid.save(tmp_path / f"epoch={epoch:03d}.png")
    picture = strip(tmp_path, (10, 6), prompts, rows=4, columns=3)
    left, top = MARGIN + 2 + 5, line_height(caption_size(10)) + 2 + 3
    seen = [[picture.getpixel((left + 12 * column, top + 8 * row))[0] for row in range(4)] for column in range(2)]
    assert seen == [[round(255 * value) for value in row] for row in shades.tolist()]


def test_curves_have_a_plot_a_number(toy_module, fit, tmp_path):
    drawn = Curves()
    fit(toy_module(), 2, callbacks=[drawn])
    figure = curves(drawn.history)
    titles = [axes.get_title() for axes in figure.axes]
    assert {"brightness", "saturation", "drift", "grad_norm"} <= set(titles)
    assert len(PANELS) - 1 == sum(bool(axes.get_ylabel()) for axes in figure.axes)  # there was no validation
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("build", [lambda: PairGallery(every_n_epochs=0), lambda: SampleStrip(columns=0)])
def test_numbers_below_one_are_refused(build):
    with pytest.raises(ConfigurationError, match="expected numbers of at least 1, got"):
        build()


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-3, -250.0])
def test_a_constant_is_a_flat_line_at_full_numbers(value):
    points = [(epoch, value * (1 + 1e-7 * (epoch % 2))) for epoch in range(8)]
    (axes,) = curves({"train/ratio": points}).axes
    low, high = axes.get_ylim()
    assert low < value < high
    assert high - low >= abs(value)
    axes.figure.draw_without_rendering()
    assert axes.yaxis.get_offset_text().get_text() == ""
