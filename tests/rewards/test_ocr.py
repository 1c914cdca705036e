import itertools
import math

import matplotlib
import numpy as np
import pytest
import torch
from lightning_fdfo_rewards.ocr import (
    OCR,
    as_line,
    ctc_log_likelihood,
    find_lines,
    load_recogniser,
    normalise,
    target_text,
)
from PIL import Image, ImageDraw, ImageFont

from lightning_fdfo.errors import ConfigurationError

FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf"


def picture(*words, height=32, width=64, size=20):
    """Words under each other, in red on white: float [3, H, W]."""
    image = Image.new("RGB", (width, height), "white")
    for line, word in enumerate(words):
        ImageDraw.Draw(image).text(
            (4, 4 + line * 2 * size), word, font=ImageFont.truetype(FONT, size), fill=(200, 30, 30)
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def score(images, targets, **options):
    return OCR(**options)(torch.stack(images), [f'"{target}"' for target in targets], [{}] * len(targets)).tolist()


def test_the_engine_is_as_we_left_it():
    """Fails when rapidocr moves the names that load_recogniser() touches."""
    recogniser = load_recogniser()
    assert recogniser.characters[0] == "blank"
    assert len(recogniser.characters) == 18710
    output = recogniser.probabilities([as_line((picture("427") * 255).byte(), 1)])
    assert output.shape == (1, 12, 18710)
    torch.testing.assert_close(output.sum(-1), torch.ones(1, 12), rtol=0, atol=1e-3)
    assert recogniser.decode(output[0]) == "427"


def test_clean_text_is_read():
    numbers = ["427", "12", "903", "58"]
    images = [picture(number) for number in numbers]
    assert score(images, numbers, score="exact_match") == [1.0] * 4
    assert score(images, numbers, score="edit_distance") == [1.0] * 4
    assert min(score(images, numbers)) > -0.1


def test_likelihood_tells_apart_what_the_edit_distance_does_not():
    clear, faint = picture("427"), 0.8 + 0.2 * picture("427")
    noisy = (clear + 0.3 * torch.randn(clear.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for score_name in ("edit_distance", "exact_match"):
        assert len(set(score([clear, faint], ["427"] * 2, score=score_name))) == 1
    assert len(set(score([clear, faint, noisy], ["427"] * 3))) == 3


def test_a_wrong_digit_costs():
    image = picture("428")
    right, wrong = score([image, image], ["428", "427"])
    assert right > wrong
    assert score([image], ["427"], score="edit_distance") == [pytest.approx(2 / 3)]
    assert score([image], ["427"], score="exact_match") == [0.0]


def test_one_by_one_equals_a_batch_also_at_other_sizes():
    images = [picture(number) for number in ("427", "12", "903", "58", "61")]
    targets = ["427", "13", "903", "58", "61"]
    together = score(images, targets, batch_size=2)
    alone = [score([image], [target])[0] for image, target in zip(images, targets, strict=True)]
    assert together == pytest.approx(alone, abs=1e-4)
    assert score([picture("427", height=64, width=64)], ["427"], score="exact_match") == [1.0]


def test_a_narrow_image_still_has_a_finite_likelihood():
    (likelihood,) = score([torch.rand(3, 64, 16)], ["12345678"])
    assert math.isfinite(likelihood)


def test_blank_images_are_scores_not_failures():
    blank = torch.ones(3, 32, 64)
    assert math.isfinite(score([blank], ["427"])[0])
    assert score([blank], ["427"], score="edit_distance") == [0.0]
    assert score([blank], ["427"], score="edit_distance", detect=True) == [0.0]


def test_detection_finds_lines_and_reads_them_in_order():
    image = picture("HELLO", "WORLD", height=160, width=240, size=36)
    assert len(find_lines((image * 255).byte())) == 2
    assert score([image], ["HELLO WORLD"], score="exact_match", detect=True) == [1.0]
    assert score([image], ["HELLO WORLD"], score="exact_match") == [0.0]
    with_detection, without = score([image], ["HELLO WORLD"], detect=True)[0], score([image], ["HELLO WORLD"])[0]
    assert with_detection > without


def collapse(path):
    return tuple(key for key, _ in itertools.groupby(path) if key)


@pytest.mark.parametrize("target", [(1,), (1, 2), (1, 1), (2, 1, 2)])
def test_ctc_sums_over_all_paths(target):
    """Against a sum written out over all 3^4 paths."""
    probabilities = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    exact = sum(
        math.prod(probabilities[column, character].item() for column, character in enumerate(path))
        for path in itertools.product(range(3), repeat=4)
        if collapse(path) == target
    )
    assert ctc_log_likelihood(probabilities, target).item() == pytest.approx(math.log(exact), rel=1e-5)


@pytest.mark.parametrize(
    ("prompt", "metadata", "target"),
    [
        ('a "427" b', {}, "427"),
        ("a “427” b", {}, "427"),
        ('a "first" and "second"', {}, "first"),
        ('a "427"', {"text": "12"}, "12"),
        ('"New York"', {}, "NewYork"),
        ("a", {"text": 7}, "7"),
    ],
)
def test_targets(prompt, metadata, target):
    assert target_text(prompt, metadata) == target


@pytest.mark.parametrize(
    ("prompt", "metadata"), [("a cat", {}), ('""', {}), ('" ! "', {}), ('"7"', {"text": ""}), ('half "', {})]
)
def test_a_prompt_without_target_is_refused(prompt, metadata):
    with pytest.raises(ConfigurationError, match='metadata "text" or text in double quotes'):
        OCR().check(prompt, metadata)


def test_unknown_characters_are_named():
    with pytest.raises(ConfigurationError, match="does not know"):
        OCR().check('"7\ue000"', {})
    OCR(score="edit_distance").check('"7\ue000"', {})


def test_normalise_keeps_letters_of_every_script():
    assert normalise("·Straße 7• 東京!") == "straße7東京"


@pytest.mark.parametrize("options", [{"score": "best"}, {"batch_size": 0}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match="expected"):
        OCR(**options)
