"""HPSv2 against scores that the package itself gave."""

import json

import pytest
import torch
from lightning_fdfo_rewards import hpsv2, preprocessing
from lightning_fdfo_rewards.hpsv2 import HPSv2

from tests.rewards.hub_folders import GOLDEN, faint, golden, golden_images

TENSORS, METADATA = golden("hpsv2_public")
IMAGES = golden_images(TENSORS)
PROMPTS = json.loads(METADATA["prompts"])


class GoldenTokenizer:
    """Knows the package's tokens of the golden prompts; CLIP's vocabulary is not ours to ship."""

    def __init__(self, *_):
        """As load_tokenizer(folder)."""

    def __call__(self, prompts, **_):
        assert prompts == [prompt.strip() for prompt in PROMPTS]  # the package's cleaning does no more to them
        return self

    input_ids = TENSORS["tokens"]
    eos_token_id = 49407


@pytest.fixture
def scores(monkeypatch):
    """Scores [4 prompts, 5 images] of the golden images, by the class itself."""

    def compute(checkpoint=GOLDEN / "hpsv2_public.pt"):
        monkeypatch.setattr(hpsv2, "load_tokenizer", GoldenTokenizer)
        monkeypatch.setattr(hpsv2.HubFiles, "fetch", lambda self: checkpoint)
        reward = HPSv2(num_heads=(2, 2))
        reward.setup(torch.device("cpu"))
        return torch.stack([reward(image.expand(4, -1, -1, -1), PROMPTS, [{}] * 4) for image in IMAGES], dim=1)

    return compute


def test_scores_are_the_packages(scores):
    torch.testing.assert_close(scores(), TENSORS["scores"], rtol=0, atol=1e-5)


def test_pixels_are_the_packages():
    own = preprocessing.normalize(preprocessing.pad_to_square(IMAGES[2], 224))
    torch.testing.assert_close(own, TENSORS["pixels"], rtol=0, atol=1e-5)


def crop(images, size):
    return preprocessing.crop_to_square(images, size)


def pad_afterwards(images, size):
    mean = torch.tensor(preprocessing.CLIP_MEAN)[:, None, None]
    padded = preprocessing.pad_to_square(images - mean, size)
    return padded + mean


@pytest.mark.parametrize("wrong", [crop, pad_afterwards])
def test_another_preprocessing_would_be_noticed(scores, monkeypatch, wrong):
    monkeypatch.setattr(hpsv2, "pad_to_square", wrong)
    assert (scores() - TENSORS["scores"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("setting", "value"),
    [("hidden_act", "quick_gelu"), ("num_attention_heads", 1)],
)
def test_another_configuration_would_be_noticed(scores, monkeypatch, setting, value):
    real = hpsv2._tower
    monkeypatch.setattr(hpsv2, "_tower", lambda *arguments: real(*arguments) | {setting: value})
    assert (scores() - TENSORS["scores"]).abs().max() > 1e-4


def test_another_epsilon_would_be_noticed(scores, monkeypatch, tmp_path):
    checkpoint, expected = faint("hpsv2", tmp_path)
    torch.testing.assert_close(scores(checkpoint), expected, rtol=0, atol=1e-5)
    real = hpsv2._tower
    monkeypatch.setattr(hpsv2, "_tower", lambda *arguments: real(*arguments) | {"layer_norm_eps": 1e-6})
    assert (scores(checkpoint) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("one", "other"),
    [("q_proj", "k_proj"), ("k_proj", "v_proj"), ("layer_norm1", "layer_norm2"), ("pre_layrnorm", "post_layernorm")],
)
def test_another_mapping_of_names_would_be_noticed(scores, monkeypatch, one, other):
    real = hpsv2._renamed

    def swapped(tensors):
        for name, tensor in real(tensors):
            yield name.replace(one, "#").replace(other, one).replace("#", other), tensor

    monkeypatch.setattr(hpsv2, "_renamed", swapped)
    assert (scores() - TENSORS["scores"]).abs().max() > 1e-4


def test_projections_that_are_not_transposed_would_be_noticed(scores, monkeypatch):
    real = hpsv2._renamed

    def kept(tensors):
        for name, tensor in real(tensors):
            yield name, tensor.T if name == "text_projection.weight" else tensor  # the square one of the two

    monkeypatch.setattr(hpsv2, "_renamed", kept)
    assert (scores() - TENSORS["scores"]).abs().max() > 1e-2
