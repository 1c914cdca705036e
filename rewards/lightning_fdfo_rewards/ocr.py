"""How well an OCR engine reads the wanted text in an image.

The recogniser (PP-OCR, in rapidocr's wheel) gives for each column of the image a probability of each character. From
those, three scores:

    likelihood     log p(target) / length, p by CTC: smooth, tells any two images apart; the one to train on
    edit_distance  1 - distance / length, at least 0, of what is read
    exact_match    1 if what is read is the target

What is read, and the target, are compared lower-cased and without anything but letters and digits. The likelihood
is of the target as it is written, without its spaces: where the recogniser sees a space, there may be a space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward import Metadata, Reward
from lightning_fdfo_rewards.ocr_rapidocr import Recogniser, find_lines, import_package, load_recogniser
from lightning_fdfo_rewards.ocr_reading import Piece, read_images
from lightning_fdfo_rewards.ocr_scores import (
    ctc_log_likelihood,
    edit_similarity,
    exact_match,
    join,
)
from lightning_fdfo_rewards.ocr_target import check_alphabet, normalise, target_text
from lightning_fdfo_rewards.ocr_tesseract import find_data, import_tesserocr, load_tesseract, read_alphabet

Score = Literal["likelihood", "edit_distance", "exact_match"]
Backend = Literal["rapidocr", "tesseract"]

_ENGLISH = {"rapidocr": ("en",), "tesseract": ("eng",)}


class OCR(Reward):
    """Reads the image and compares with the wanted text.

    The target is `metadata["text"]`, a string, where it is given. Otherwise it is the text in the prompt's first pair
    of quotes with a letter or a digit between them: "…", “…”, „…“, «…», »…«, 「…」 or 『…』; where there is none of
    these, '…', ‘…’ or ‚…‘. A " after a digit is taken for inches.

    Args:
        score: see the head of this file.
        detect: find pieces of text first, and read those line by line, from left to right; otherwise the whole image is
            one line. An image in which nothing is found is read as a whole.
        languages: in the engine's own names; not given: English.
            rapidocr: `en`, `de`, `ch`, `ja`, … (Latin scripts, Chinese, Japanese) are read by one recogniser, in its
            wheel; others, as `korean`, `cyrillic`, `el`, `th`, by one each, which rapidocr downloads.
            tesseract: names of its data files, `eng`, `deu`, `chi_sim`, …
        backend: `rapidocr`, or `tesseract` (`pip install 'lightning-fdfo-rewards[tesseract]'` and its language data):
            it reads less, has no likelihood, and with `detect` takes a quarter of the time.
        batch_size: lines a forward; tesseract reads one at a time.

    Raises:
        ConfigurationError: options out of range; in `check` and `setup`: a prompt without target, or with a character
            that the engine does not know; languages, or packages, that are not there.

    Example:
        >>> target_text('the number "427" in red', {})
        '427'
        >>> OCR().check("no quotes", {})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_fdfo.errors.ConfigurationError: OCR needs metadata "text" or text in quotes ..., got 'no quotes'
    """

    range = (float("-inf"), 0.0)
    needs = 'metadata "text", or text in quotes in the prompt'
    packaged_weights = "PP-OCRv6 in rapidocr (Apache-2.0)"
    device = "cpu"

    def __init__(
        self,
        score: Score = "likelihood",
        detect: bool = False,
        languages: Sequence[str] | None = None,
        backend: Backend = "rapidocr",
        batch_size: int = 32,
    ) -> None:
        if score not in ("likelihood", "edit_distance", "exact_match"):
            raise ConfigurationError(f"OCR: expected score likelihood, edit_distance or exact_match, got {score!r}")
        if backend not in _ENGLISH:
            raise ConfigurationError(f"OCR: expected backend rapidocr or tesseract, got {backend!r}")
        if backend == "tesseract" and score == "likelihood":
            raise ConfigurationError(
                "OCR: score likelihood is expected with backend rapidocr: tesseract gives no probability of a target; "
                "set score: edit_distance or exact_match"
            )
        named = languages is None or (languages and not isinstance(languages, str))
        if not named or not all(isinstance(language, str) for language in languages or ()):  # YAML's `no` is a bool
            raise ConfigurationError(
                f"OCR: expected a list of languages, as [{_ENGLISH[backend][0]}], got {languages!r}"
            )
        if batch_size < 1:
            raise ConfigurationError(f"OCR: expected batch_size >= 1, got {batch_size}")
        self.score = score
        self.detect = detect
        self.languages: tuple[str, ...] = _ENGLISH[backend] if languages is None else tuple(languages)
        self.backend = backend
        self.batch_size = batch_size
        if score != "likelihood":
            self.range = (0.0, 1.0)

    def check(self, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError for a prompt without target or with an unknown character, and for languages."""
        target = target_text(prompt, metadata)
        if self.score == "edit_distance":
            import_package("rapidfuzz")
        if self.backend == "tesseract":
            import_tesserocr()
            alphabet = read_alphabet(find_data(self.languages), self.languages)
            if alphabet is not None:
                check_alphabet(target, alphabet, f"tesseract's data of {', '.join(self.languages)}")
        elif self.score == "likelihood":
            load_recogniser(self.languages).encode(target)
        else:
            check_alphabet(target, load_recogniser(self.languages).readable, "the recogniser")

    def fetch(self) -> None:
        """Downloads the recogniser if it is not in rapidocr's wheel."""
        if self.backend == "rapidocr":
            load_recogniser(self.languages)

    def setup(self, device: torch.device) -> None:
        """Loads the engine; it runs on the CPU."""
        if self.backend == "rapidocr":
            load_recogniser(self.languages)
            if self.detect:
                find_lines(torch.zeros(3, 32, 32, dtype=torch.uint8))  # the detector is loaded with the first image
        else:
            load_tesseract(self.languages)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores a batch; see `Reward.__call__`."""
        targets = [target_text(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        pixels = (images.clamp(0, 1) * 255).round().byte().cpu()
        if self.score == "likelihood":
            return self._likelihoods(pixels, targets)
        compare = edit_similarity if self.score == "edit_distance" else exact_match
        texts = self._texts(pixels, targets)
        return torch.tensor(
            [compare(normalise(text), normalise(target)) for text, target in zip(texts, targets, strict=True)]
        )

    def _likelihoods(self, pixels: Tensor, targets: Sequence[str]) -> Tensor:
        """Log p(target) / length of each image."""
        recogniser = load_recogniser(self.languages)
        encoded = [recogniser.encode(target) for target in targets]
        read = self._read(recogniser, pixels, targets, min_columns=[2 * len(target) + 1 for target in targets])
        return torch.stack(
            [
                ctc_log_likelihood(
                    join([piece.probabilities for piece in pieces]), [1 + wanted.index(one) for one in indices]
                )
                / len(indices)
                for pieces, indices in zip(read, encoded, strict=True)
                for wanted in [sorted(set(indices))]
            ]
        )

    def _texts(self, pixels: Tensor, targets: Sequence[str]) -> list[str]:
        """What is read in each image."""
        if self.backend == "tesseract":
            tesseract = load_tesseract(self.languages)
            return [tesseract.read(image, self.detect) for image in pixels]
        recogniser = load_recogniser(self.languages)
        read = self._read(recogniser, pixels, targets, min_columns=[0] * len(targets))
        return ["".join(recogniser.decode(piece.best) for piece in pieces) for pieces in read]

    def _read(
        self, recogniser: Recogniser, pixels: Tensor, targets: Sequence[str], min_columns: Sequence[int]
    ) -> list[list[Piece]]:
        return read_images(
            recogniser, pixels, targets, min_columns=min_columns, detect=self.detect, batch_size=self.batch_size
        )
