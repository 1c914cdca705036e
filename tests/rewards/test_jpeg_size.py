import io

import pytest
import torch
from lightning_fdfo_rewards.jpeg_size import JPEGSize
from PIL import Image

from lightning_fdfo.errors import ConfigurationError


def test_noise_is_larger_than_black_and_the_sign_turns_it():
    images = torch.stack([torch.rand(3, 32, 48), torch.zeros(3, 32, 48)])
    noise, black = JPEGSize()(images, ["", ""], [{}, {}]).tolist()
    assert noise > 2 * black
    assert JPEGSize(sign=-1)(images, ["", ""], [{}, {}]).tolist() == [-noise, -black]


def test_it_is_the_files_size():
    image = torch.rand(1, 3, 16, 24)
    file = io.BytesIO()
    pixels = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(file, "jpeg", quality=70)
    assert JPEGSize(quality=70)(image, [""], [{}]).item() == pytest.approx(len(file.getvalue()) / 1000)


@pytest.mark.parametrize("options", [{"quality": 0}, {"quality": 100}, {"sign": 2}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match="expected quality in 1 … 95 and sign 1 or -1"):
        JPEGSize(**options)
