"""How well an OCR engine reads the wanted text in an image.

The recogniser (PP-OCR, in rapidocr's wheel) gives for each column of the image a probability of each character. From
those, three scores:

    likelihood     log p(target) / length, p by CTC: smooth, tells any two images apart; the one to train on
    edit_distance  1 - distance / length, at least 0, of what is read
    exact_match    1 if what is read is the target

What is read, and the target, are compared lower-cased and without anything but letters and digits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fdfo import Reward
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward import Metadata

Score = Literal["likelihood", "edit_distance", "exact_match"]

LINE_HEIGHT = 48
COLUMN_WIDTH = 8
"""Pixels of a line of LINE_HEIGHT that the recogniser turns into one column."""

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”|„([^“”]*)[“”]')


class OCR(Reward):
    """Reads the image and compares with the wanted text.

    The target is `metadata["text"]` where it is given, else the text in the prompt's first pair of double quotes.

    Args:
        score: see the head of this file.
        detect: find lines of text first, and read those from top to bottom; otherwise the whole image is one line.
            An image in which nothing is found is read as a whole.
        batch_size: lines a forward.

    Raises:
        ConfigurationError: another score; in `check`: a prompt without target, or, for `likelihood`, with a character
            that the recogniser does not know.

    Example:
        >>> target_text('the number "427" in red', {})
        '427'
        >>> OCR().check("no quotes", {})
        Traceback (most recent call last):
        ...
        lightning_fdfo.errors.ConfigurationError: OCR needs metadata "text" or text in double quotes, got 'no quotes'
    """

    range = (float("-inf"), 0.0)
    needs = 'metadata "text", or text in double quotes in the prompt'

    def __init__(self, score: Score = "likelihood", detect: bool = False, batch_size: int = 32) -> None:
        if score not in ("likelihood", "edit_distance", "exact_match"):
            raise ConfigurationError(f"OCR: expected score likelihood, edit_distance or exact_match, got {score!r}")
        if batch_size < 1:
            raise ConfigurationError(f"OCR: expected batch_size >= 1, got {batch_size}")
        self.score = score
        self.detect = detect
        self.batch_size = batch_size
        if score != "likelihood":
            self.range = (0.0, 1.0)

    def check(self, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError for a prompt without target, or with an unknown character."""
        target = target_text(prompt, metadata)
        if self.score == "likelihood":
            load_recogniser().encode(target)

    def setup(self, device: torch.device) -> None:
        """Loads the engine; it runs on the CPU."""
        load_recogniser()

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores a batch; see `Reward.__call__`."""
        recogniser = load_recogniser()
        targets = [target_text(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        columns = self._read_columns(images, [len(target) for target in targets])
        if self.score == "likelihood":
            return torch.stack(
                [
                    ctc_log_likelihood(probabilities, recogniser.encode(target)) / len(target)
                    for probabilities, target in zip(columns, targets, strict=True)
                ]
            )
        read = [normalise(recogniser.decode(probabilities)) for probabilities in columns]
        compare = edit_similarity if self.score == "edit_distance" else exact_match
        return torch.tensor([compare(text, normalise(target)) for text, target in zip(read, targets, strict=True)])

    def _read_columns(self, images: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Each image's probabilities [columns, characters]; the lines of one image are put one after the other."""
        recogniser = load_recogniser()
        pixels = (images.clamp(0, 1) * 255).round().byte().cpu()
        lines = [find_lines(image) if self.detect else [image] for image in pixels]
        flat = [
            as_line(line, min_columns=2 * length + 1)
            for image_lines, length in zip(lines, lengths, strict=True)
            for line in image_lines
        ]
        read: list[Tensor] = [torch.empty(0)] * len(flat)
        by_width: dict[int, list[int]] = {}
        for index, line in enumerate(flat):
            by_width.setdefault(line.shape[-1], []).append(index)
        for indices in by_width.values():
            for start in range(0, len(indices), self.batch_size):
                chunk = indices[start : start + self.batch_size]
                for index, probabilities in zip(chunk, recogniser.probabilities([flat[i] for i in chunk]), strict=True):
                    read[index] = probabilities
        parts = iter(read)
        return [torch.cat([next(parts) for _ in image_lines]) for image_lines in lines]


def target_text(prompt: str, metadata: Metadata) -> str:
    """The text that an image should show, without spaces.

    Raises:
        ConfigurationError: there is none.

    Example:
        >>> target_text("a sign", {"text": "New York"})
        'NewYork'
    """
    text = metadata.get("text")
    if text is None:
        match = _QUOTED.search(prompt)
        text = next((group for group in match.groups() if group is not None), "") if match else ""
    target = "".join(str(text).split())
    if not normalise(target):
        raise ConfigurationError(f'OCR needs metadata "text" or text in double quotes, got {prompt[:80]!r}')
    return target


def normalise(text: str) -> str:
    """Lower case, letters and digits only.

    Example:
        >>> normalise("New-York 7!")
        'newyork7'
    """
    return "".join(character for character in text.lower() if character.isalnum())


def edit_similarity(read: str, target: str) -> float:
    """1 - Levenshtein distance / length of the target, at least 0.

    Example:
        >>> edit_similarity("428", "427"), edit_similarity("", "7"), edit_similarity("4274", "42")
        (0.6666666666666667, 0.0, 0.0)
    """
    from rapidfuzz.distance import Levenshtein

    return max(0.0, 1 - Levenshtein.distance(read, target) / len(target))


def exact_match(read: str, target: str) -> float:
    """1.0 if they are equal, else 0.0."""
    return float(read == target)


def ctc_log_likelihood(probabilities: Tensor, target: Sequence[int]) -> Tensor:
    """Log p(target): the sum over all ways to write it into the columns, with blanks and repeats.

    Args:
        probabilities: [columns, characters], rows sum to 1, character 0 is the blank.
        target: indices of the characters; needs len(target) columns, and one more for each repeat.

    Returns:
        0-d, float32, <= 0.

    Example:
        >>> ctc_log_likelihood(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), [1]).exp().item()
        0.75

    Source: Graves et al. 2006; torch.nn.functional.ctc_loss.
    """
    log_probabilities = probabilities.clamp_min(1e-12).log()[:, None]
    loss = F.ctc_loss(
        log_probabilities,
        torch.tensor([list(target)]),
        input_lengths=torch.tensor([len(log_probabilities)]),
        target_lengths=torch.tensor([len(target)]),
        reduction="sum",
    )
    return -loss.float()


def as_line(image: Tensor, min_columns: int) -> Tensor:
    """An image as the recogniser wants it.

    Args:
        image: uint8 [3, H, W], RGB.
        min_columns: padded with its own last column of pixels to at least so many of the recogniser's columns.

    Returns:
        float32 [3, 48, width] in [-1, 1], BGR, the width a multiple of 8.
    """
    _, height, width = image.shape
    new_width = max(1, round(LINE_HEIGHT * width / height))
    resized = F.interpolate(
        image[None].float(), (LINE_HEIGHT, new_width), mode="bilinear", antialias=height > LINE_HEIGHT
    )
    padded_width = COLUMN_WIDTH * max(-(-new_width // COLUMN_WIDTH), min_columns)
    padded = F.pad(resized, (0, padded_width - new_width, 0, 0), mode="replicate")
    return padded[0].flip(0) / 127.5 - 1


class Recogniser(NamedTuple):
    """rapidocr's recogniser, bare."""

    session: Any
    """float32 [N, 3, 48, W] -> [N, W / 8, characters], a softmax"""
    characters: list[str]
    """index 0 is the blank"""

    def probabilities(self, lines: Sequence[Tensor]) -> Tensor:
        """Lines of one width, [3, 48, W] each -> [N, W / 8, characters]."""
        return torch.from_numpy(np.asarray(self.session(torch.stack(list(lines)).numpy())))

    def encode(self, text: str) -> list[int]:
        """Indices of a text's characters; raises ConfigurationError for one that is not in the alphabet."""
        index = _indices()
        unknown = sorted({character for character in text if character not in index})
        if unknown:
            raise ConfigurationError(f"OCR: the recogniser does not know {unknown} in {text!r}")
        return [index[character] for character in text]

    def decode(self, probabilities: Tensor) -> str:
        """The most likely character of each column, without blanks and repeats."""
        best = probabilities.argmax(dim=-1).tolist()
        kept = (one for one, before in zip(best, [0, *best[:-1]], strict=True) if one not in (0, before))
        return "".join(self.characters[index] for index in kept)


@cache
def _engine() -> Any:
    """The whole of rapidocr, with its packaged models; loaded once a process."""
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.use_cls": False, "Global.log_level": "critical", "Det.limit_side_len": 128})


@cache
def load_recogniser() -> Recogniser:
    """The recogniser's session and alphabet.

    These are not documented names of rapidocr: they are touched here and nowhere else, the version has an upper
    bound, and a test says so when they change.
    """
    engine = _engine()
    engine(np.full((LINE_HEIGHT, 2 * LINE_HEIGHT, 3), 255, dtype=np.uint8), use_det=False)
    return Recogniser(engine.text_rec.session, list(engine.text_rec.postprocess_op.character))


@cache
def _indices() -> dict[str, int]:
    """Character -> index of the recogniser's alphabet."""
    return {character: index for index, character in enumerate(load_recogniser().characters) if index}


def find_lines(image: Tensor) -> list[Tensor]:
    """The lines of text in an image, from top to bottom and left to right; the image itself if none is found.

    Args:
        image: uint8 [3, H, W], RGB.

    Returns:
        uint8 [3, h, w] each.
    """
    bgr: npt.NDArray[np.uint8] = image.flip(0).permute(1, 2, 0).contiguous().numpy()
    boxes = _engine()(bgr, use_det=True, use_rec=False).boxes
    lines = []
    for box in [] if boxes is None else boxes:
        (left, top), (right, bottom) = np.floor(box.min(axis=0)).astype(int), np.ceil(box.max(axis=0)).astype(int)
        line = image[:, max(top, 0) : bottom, max(left, 0) : right]
        if line.numel():
            lines.append(line)
    return lines or [image]
