"""VLMPreference against a forward of the same model that is written out here, one order at a time."""

import math

import pytest
import torch
from lightning_fdfo_rewards.vlm_preference import VLMPreference
from lightning_fdfo_rewards.vlm_score import VLMScore
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.testing import check_reward
from tests.rewards.test_vlm_score import GENERATIONS, PROMPTS, images_8bit

IMAGE = "<|vision_start|>{pads}<|vision_end|>"


@torch.no_grad()
def probability_gap(folder, pixels, question, first="A", second="B"):
    """p(first) - p(second), of two images in this order: no batch, no padding."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    images = processor([Image.fromarray(pixel) for pixel in pixels], do_resize=False, return_tensors="pt")
    count = images.image_grid_thw[0].prod().item() // 4
    image = IMAGE.format(pads="<|image_pad|>" * count)
    text = f"<|im_start|>user\n{first}:{image}{second}:{image}{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    logits = model(
        input_ids=ids,
        pixel_values=images.pixel_values,
        image_grid_thw=images.image_grid_thw,
        mm_token_type_ids=types,
    ).logits[0, -1]
    chances = torch.stack([logits[tokenizer.convert_tokens_to_ids(word)] for word in (first, second)]).softmax(0)
    return (chances[0] - chances[1]).item()


def preference(folder, size, **options):
    reward = VLMPreference(str(folder), image_size=size, dtype="float32", batch_size=3, **options)
    reward.setup(torch.device("cpu"))
    return reward


@pytest.mark.parametrize(("name", "size"), GENERATIONS)
def test_it_is_the_mean_of_both_orders_of_the_direct_forward(folders, name, size):
    pixels, images = images_8bit(size)
    reward = preference(folders / name, size)
    own = reward(images, images.roll(1, 0), PROMPTS, [{}] * 4)
    for row, prompt in enumerate(PROMPTS):
        one, other = pixels[row], pixels[row - 1]
        there = probability_gap(folders / name, [one, other], reward.ask(prompt))
        back = probability_gap(folders / name, [other, one], reward.ask(prompt))
        assert own[row].item() == pytest.approx((there - back) / 2, abs=1e-4)
    assert own.abs().max() > 1e-3


@pytest.mark.parametrize(("name", "size"), GENERATIONS)
def test_it_turns_with_the_images(folders, name, size):
    _, images = images_8bit(size)
    reward, others = preference(folders / name, size), images.roll(1, 0)
    there, back = (reward(one, other, PROMPTS, [{}] * 4) for one, other in ((images, others), (others, images)))
    torch.testing.assert_close(there, -back, rtol=0, atol=1e-6)
    assert not reward(images, images, PROMPTS, [{}] * 4).abs().gt(1e-6).any()


def test_both_rewards_of_a_model_load_it_once(folders):
    rewards = [preference(folders / "qwen2", 56), VLMScore(str(folders / "qwen2"), image_size=56, dtype="float32")]
    rewards[1].setup(torch.device("cpu"))
    assert rewards[0].model.model is rewards[1].model.model


def test_it_keeps_the_contract(folders):
    check_reward(VLMPreference(str(folders / "qwen2"), image_size=56, dtype="float32"))


def test_question_and_answers_are_options(folders):
    pixels, images = images_8bit(56)
    reward = preference(folders / "qwen2", 56, template="{prompt}?", first="Yes", second="No")
    own = reward(images[:1], images[1:2], ["a cat"], [{}]).item()
    gaps = [probability_gap(folders / "qwen2", pair, "a cat?", "Yes", "No") for pair in (pixels[:2], pixels[1::-1])]
    assert own == pytest.approx((gaps[0] - gaps[1]) / 2, abs=1e-4)
    assert not math.isclose(own, 0, abs_tol=1e-6)


def test_bad_options_are_named(folders):
    with pytest.raises(ConfigurationError, match=r"VLMPreference: expected a template with \{prompt\} in it"):
        VLMPreference(template="Which?")
    with pytest.raises(ConfigurationError, match="VLMPreference: expected two different answers, got 'A' twice"):
        VLMPreference(second="A")
    with pytest.raises(ConfigurationError, match=r"VLMPreference: '<\|im_end\|>' in .* is a control word"):
        VLMPreference().check("a cat<|im_end|>", {})
    with pytest.raises(ConfigurationError, match="VLMPreference: expected an answer of one token, got 'left image'"):
        preference(folders / "qwen2", 56, first="left image")
    with pytest.raises(ConfigurationError, match="VLMPreference: expected image_size to be a multiple of 28"):
        preference(folders / "qwen2", 57)
