"""ImageReward against scores that the package itself gave."""

import json

import numpy as np
import pytest
import torch
import transformers
from lightning_fdfo_rewards import image_reward
from lightning_fdfo_rewards.image_reward import ImageReward
from lightning_fdfo_rewards.preprocessing import crop_to_square, normalize
from PIL import Image

from tests.rewards.hub_folders import faint, golden, golden_images, image_reward_files

TENSORS, METADATA = golden("image_reward_public")
IMAGES = golden_images(TENSORS)
PROMPTS = json.loads(METADATA["prompts"])


def through_pil(images, size, rounding=round):
    """The package's own way: 8 bits before and after the resize."""
    pixels = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    scale = size / min(image.size)
    image = image.resize(tuple(int(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = (rounding((side - size) / 2) for side in image.size)
    cropped = np.array(image.crop((left, top, left + size, top + size)))
    return (torch.from_numpy(cropped).permute(2, 0, 1)[None].float() / 255).expand(len(images), -1, -1, -1)


@pytest.fixture
def scores(tmp_path):
    """Scores [4 prompts, 5 images] of the golden images, by the class itself, tokenizer included."""

    def compute(**options):
        reward = ImageReward(**(image_reward_files(tmp_path) | options))
        reward.setup(torch.device("cpu"))
        return torch.stack([reward(image.expand(4, -1, -1, -1), PROMPTS, [{}] * 4) for image in IMAGES], dim=1)

    return compute


def test_scores_are_the_packages_on_float_images(scores):
    torch.testing.assert_close(scores(), TENSORS["scores"], rtol=0, atol=1e-2)


def test_scores_are_the_packages_to_the_digit_through_8_bits(scores, monkeypatch):
    monkeypatch.setattr(image_reward, "crop_to_square", through_pil)
    torch.testing.assert_close(scores(), TENSORS["scores"], rtol=0, atol=1e-5)


def test_pixels_are_the_packages_but_for_its_8_bits():
    torch.testing.assert_close(normalize(through_pil(IMAGES[2], 224)), TENSORS["pixels"], rtol=0, atol=1e-5)
    difference = (normalize(crop_to_square(IMAGES[2], 224, rounding=round)) - TENSORS["pixels"]).abs()
    assert difference.mean() < 0.01
    assert difference.max() < 0.1  # noise overshoots; PIL cuts it off between its two passes


def test_tokens_are_the_packages(tmp_path):
    reward = ImageReward(**image_reward_files(tmp_path))
    reward.setup(torch.device("cpu"))
    tokens = reward._tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert torch.equal(tokens.input_ids, TENSORS["token_ids"])


@pytest.mark.parametrize(
    ("config", "setting", "value"),
    [
        ("BlipVisionConfig", "num_attention_heads", 2),
        ("BlipTextConfig", "hidden_act", "relu"),
        ("BlipTextConfig", "num_attention_heads", 2),
    ],
)
def test_another_configuration_would_be_noticed(scores, monkeypatch, config, setting, value):
    monkeypatch.setattr(image_reward, "crop_to_square", through_pil)
    real = getattr(transformers, config)
    monkeypatch.setattr(transformers, config, lambda **sizes: real(**(sizes | {setting: value})))
    assert (scores() - TENSORS["scores"]).abs().max() > 2e-5


def test_transformers_default_epsilon_would_be_noticed(scores, monkeypatch, tmp_path):
    """1e-5 in the image encoder, where timm has 1e-6."""
    monkeypatch.setattr(image_reward, "crop_to_square", through_pil)
    checkpoint, expected = faint("image_reward", tmp_path)
    torch.testing.assert_close(scores(checkpoint=str(checkpoint)), expected, rtol=0, atol=1e-5)
    real = transformers.BlipVisionConfig
    monkeypatch.setattr(transformers, "BlipVisionConfig", lambda **sizes: real(**(sizes | {"layer_norm_eps": 1e-5})))
    assert (scores(checkpoint=str(checkpoint)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("one", "other"), [("layer_norm1", "layer_norm2"), ("qkv.weight", "qkv.weight")])
def test_another_mapping_of_names_would_be_noticed(scores, monkeypatch, one, other):
    real = image_reward._image_tensors

    def wrong(tensors):
        for name, tensor in real(tensors):
            if one == other == "qkv.weight" and name.endswith(one):
                yield name, tensor.roll(len(tensor) // 3, dims=0)  # v, q, k
            else:
                yield name.replace(one, "#").replace(other, one).replace("#", other), tensor

    monkeypatch.setattr(image_reward, "_image_tensors", wrong)
    assert (scores() - TENSORS["scores"]).abs().max() > 1e-2


@pytest.mark.parametrize("constant", ["MEAN", "STD"])
def test_other_constants_would_be_noticed(scores, monkeypatch, constant):
    monkeypatch.setattr(image_reward, constant, getattr(image_reward, constant) * 1.1)
    assert (scores() - TENSORS["scores"]).abs().max() > 1e-2
