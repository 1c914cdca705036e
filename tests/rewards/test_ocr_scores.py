import itertools
import math
import re

import pytest
import torch
from lightning_fdfo_rewards.ocr_scores import ctc_log_likelihood, join
from lightning_fdfo_rewards.ocr_target import normalise, target_text

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
        ('a 5" nail and a sign "HELLO"', {}, "HELLO"),
        ('a 5" nail, a 6" nail and "HELLO"', {}, "HELLO"),
        ('a sign "HELLO" beside a 5" nail', {}, "HELLO"),
        ('"427" in red', {}, "427"),
        ('写着"你好"的牌子', {}, "你好"),
        ('a sign "" and a sign " ! " and a sign "GO"', {}, "GO"),
        ("a „Straße“ b", {}, "Straße"),
        ("a „Straße” b", {}, "Straße"),
        ("a sign that says « SALON »", {}, "SALON"),
        ("a sign that says »SALON«", {}, "SALON"),
        ("看板「東京」", {}, "東京"),
        ("看板『東京』", {}, "東京"),
        ("a sign that says 'OPEN'", {}, "OPEN"),
        ("a sign, ‘DON’T’, in red", {}, "DON’T"),
        ("a sign ‚OFFEN‘", {}, "OFFEN"),
        ("the dog's sign says 'OPEN' to the cats' surprise", {}, "OPEN"),
        ("'OPEN' beside \"CLOSED\"", {}, "CLOSED"),
        ("a man of 6'2\" with a sign 'GO'", {}, "GO"),
    ],
)
def test_targets(prompt, metadata, target):
    assert target_text(prompt, metadata) == target


@pytest.mark.parametrize(
    "prompt", ["", "a cat", '""', '" ! "', 'half "', 'a 5" nail and a 6" nail', "the dogs' bowl and the cats' bed"]
)
def test_a_prompt_without_target_is_refused_and_told_what_counts(prompt):
    message = re.escape(
        """metadata "text" or text in quotes in the prompt ("…", “…”, „…“, «…», 「…」, 『…』 or '…', with"""
    )
    with pytest.raises(ConfigurationError, match=rf"{message}.*taken for inches\), got"):
        target_text(prompt, {})


@pytest.mark.parametrize("text", [["A", "B"], {"A": 1}, True, 4.2, "", " ! "])
def test_metadata_are_a_text(text):
    with pytest.raises(ConfigurationError, match=r'expected metadata "text" to be a string .*got .*; of several texts'):
        target_text('"7"', {"text": text})


def test_normalise_keeps_letters_of_every_script():
    assert normalise("·Straße 7• 東京!") == "straße7東京"
    assert normalise("７Ａ") == "7a"
