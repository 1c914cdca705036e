import itertools
import math

import pytest
import torch
from lightning_fdfo_rewards.ocr_scores import ctc_log_likelihood, join, normalise, target_text

from lightning_fdfo.errors import ConfigurationError


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


def test_a_blank_between_pieces():
    """Two columns, each surely an l: together one l, as pieces two."""
    piece = torch.tensor([[0.0, 1.0]])
    assert ctc_log_likelihood(torch.cat([piece, piece]), [1]).item() == 0
    assert ctc_log_likelihood(join([piece, piece]), [1, 1]).item() == 0
    assert ctc_log_likelihood(join([piece, piece]), [1]).item() < -20


def test_a_likelihood_is_never_above_one():
    rounded_up = torch.tensor([[1.00001, 0.00001], [0.00001, 1.00001]])
    assert ctc_log_likelihood(rounded_up, [1]).item() <= 0


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
    ("prompt", "metadata"), [("", {}), ("a cat", {}), ('""', {}), ('" ! "', {}), ('"7"', {"text": ""}), ('half "', {})]
)
def test_a_prompt_without_target_is_refused(prompt, metadata):
    with pytest.raises(ConfigurationError, match='metadata "text" or text in double quotes'):
        target_text(prompt, metadata)


def test_normalise_keeps_letters_of_every_script():
    assert normalise("·Straße 7• 東京!") == "straße7東京"
    assert normalise("７Ａ") == "7a"
