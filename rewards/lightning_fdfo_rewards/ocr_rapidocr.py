"""rapidocr as the OCR reward uses it: which recogniser reads which languages, its probabilities, and lines of text.

rapidocr's engine returns text only. The recogniser's probabilities, its alphabet and the table of its models are under
names that rapidocr does not document: they are touched in this file and nowhere else, the version has an upper bound,
and a test says so when they change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo_rewards.ocr_lines import LINE_HEIGHT, at_most_so_narrow, reading_order
from lightning_fdfo_rewards.ocr_target import normalised, unknown_characters

T = TypeVar("T")

MODELS = (("PP-OCRv6", "small"), ("PP-OCRv5", "mobile"), ("PP-OCRv4", "mobile"))
"""Versions and sizes, best first; the first one is in rapidocr's wheel, others are downloaded."""

_LOADING, _DETECTING = threading.Lock(), threading.Lock()


def import_package(name: str) -> ModuleType:
    """A package that rapidocr's backend needs; raises ConfigurationError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"OCR needs {name}, which cannot be imported ({error}): pip install {name}, or all that it needs: "
            "pip install lightning-fdfo-rewards"
        ) from error


class Model(NamedTuple):
    """One of rapidocr's recognisers."""

    key: str
    version: str
    size: str
    language: str
    """One that it reads, by which rapidocr finds it."""


@cache
def choose_model(languages: tuple[str, ...]) -> Model:
    """The best recogniser that reads all of the languages, by rapidocr's own table; loads nothing.

    Raises:
        ConfigurationError: a language that none reads, or no single one that reads all; Arabic; no rapidocr.

    Example:
        >>> choose_model(("en", "de", "ja")).key
        'multi_PP-OCRv6_rec_small'
        >>> choose_model(("korean",)).key
        'korean_PP-OCRv5_rec_mobile'
    """
    for package in ("rapidocr", "onnxruntime"):
        import_package(package)
    for version, size in MODELS:
        keys = {_model_key(language, version, size) for language in languages}
        key = keys.pop()
        if keys or key is None:
            continue
        if key.startswith("arabic"):  # PP-OCR writes it in the order of display: its columns run against the target
            raise ConfigurationError(
                "OCR: rapidocr's recogniser of arabic reads right to left, which is not supported; "
                "use backend tesseract with languages: [ara]"
            )
        return Model(key, version, size, languages[0])
    raise ConfigurationError(_not_covered(languages))


def _model_key(language: str, version: str, size: str) -> str | None:
    """The name of the recogniser of this version and size that reads the language, if there is one."""
    from rapidocr.utils.model_resolver import route_to_model_key
    from rapidocr.utils.typings import ModelType, OCRVersion, TaskType

    try:
        key: str | None = route_to_model_key(TaskType.REC, OCRVersion(version), language, ModelType(size))
    except ValueError:
        return None
    return key


def _not_covered(languages: tuple[str, ...]) -> str:
    """The message when no single recogniser reads all of the languages."""
    from rapidocr import RapidOCR

    readers = {
        language: [key for version, size in MODELS if (key := _model_key(language, version, size))]
        for language in languages
    }
    if unknown := [language for language, keys in readers.items() if not keys]:
        known = sorted({name for model in MODELS for name in RapidOCR.list_supported_langs("rec", *model)})
        return f"OCR: rapidocr has no recogniser for languages {unknown}; it knows {', '.join(known)}"
    table = "; ".join(f"{language}: {', '.join(keys)}" for language, keys in readers.items())
    return f"OCR: expected languages that one of rapidocr's recognisers reads together, got {table}; take fewer"


class LastReading:
    """A result, kept until another is asked for; may be called from any thread."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._result: Any = None
        self._reading = threading.Lock()  # who comes second waits for the first one's result

    def get(self, key: Hashable, read: Callable[[], T]) -> T:
        """The kept result if `key` is its own, else that of `read`."""
        with self._reading:
            if key != self._key:
                self._key = self._result = None
                self._result = read()
                self._key = key
            result: T = self._result
            return result


class Recogniser(NamedTuple):
    """rapidocr's recogniser, bare; may be called from any thread."""

    session: Any
    """float32 [N, 3, 48, W] -> [N, W / 8, characters], a softmax"""
    characters: list[str]
    """index 0 is the blank"""
    indices: dict[str, int]
    """character -> index, without the blank"""
    readable: frozenset[str]
    """letters and digits that it may read, as they are compared"""
    last: LastReading
    """of the last batch of images, for another reward that scores it"""

    def probabilities(self, lines: Sequence[Tensor]) -> Tensor:
        """Lines of one width, [3, 48, W] each -> [N, W / 8, characters]."""
        return torch.from_numpy(np.asarray(self.session(torch.stack(list(lines)).numpy())))

    def encode(self, text: str) -> list[int]:
        """Indices of a text's characters; raises ConfigurationError for one that is not in the alphabet."""
        unknown = sorted({character for character in text if character not in self.indices})
        if unknown:
            raise ConfigurationError(unknown_characters(unknown, text, "the recogniser"))
        return [self.indices[character] for character in text]

    def decode(self, best: Tensor) -> str:
        """Text of each column's most likely character, long [columns]: without blanks and repeats."""
        indices = best.tolist()
        kept = (one for one, before in zip(indices, [0, *indices[:-1]], strict=True) if one not in (0, before))
        return "".join(self.characters[index] for index in kept)


_RECOGNISERS: dict[str, Recogniser] = {}


def load_recogniser(languages: tuple[str, ...]) -> Recogniser:
    """The recogniser of these languages, loaded once a process, whatever the number of rewards that use it.

    Raises:
        ConfigurationError: as `choose_model`; a model that is not in rapidocr's wheel and cannot be downloaded.
    """
    model = choose_model(languages)
    with _LOADING:  # two rewards may be set up in two threads
        if model.key not in _RECOGNISERS:  # the key, not the language: English and German share one
            _RECOGNISERS[model.key] = _load(model)
        return _RECOGNISERS[model.key]


def _load(model: Model) -> Recogniser:
    """A recogniser's session and alphabet."""
    import rapidocr
    from rapidocr.utils.download_file import DownloadFileException

    engine = _engine(
        {
            "Rec.ocr_version": rapidocr.OCRVersion(model.version),
            "Rec.model_type": rapidocr.ModelType(model.size),
            "Rec.lang_type": model.language,
        }
    )
    try:  # components are loaded with the first image
        engine(np.full((LINE_HEIGHT, 2 * LINE_HEIGHT, 3), 255, dtype=np.uint8), use_det=False)
    except (DownloadFileException, OSError) as error:
        folder = Path(rapidocr.__file__).parent / "models"
        raise ConfigurationError(
            f"OCR: the recogniser {model.key} is not in rapidocr's wheel and cannot be "
            f"downloaded ({error}); put that file into {folder}"
        ) from error
    characters = list(engine.text_rec.postprocess_op.character)
    indices = {character: index for index, character in enumerate(characters) if index}
    return Recogniser(engine.text_rec.session, characters, indices, normalised(characters[1:]), LastReading())


def _engine(params: dict[str, Any]) -> Any:
    """A rapidocr engine; each of its components loads with the first image that needs it."""
    from rapidocr import RapidOCR

    # Its default enlarges a small image to sides of 736 pixels: eight times the time, nothing better read.
    return RapidOCR(
        params={"Global.use_cls": False, "Global.log_level": "critical", "Det.limit_side_len": 128, **params}
    )


@cache
def _detector() -> Any:
    """The engine for detection: one of its own, because a call sets what an engine does next."""
    return _engine({"Global.use_rec": False})


def find_lines(image: Tensor) -> list[Tensor]:
    """The pieces of text in an image, in reading order; the image itself if none is found.

    The engine enlarges the short side to 128 pixels, whatever the long one becomes: a narrow image is padded first.

    Args:
        image: uint8 [3, H, W], RGB.

    Returns:
        uint8 [3, h, w] each.
    """
    bgr: npt.NDArray[np.uint8] = at_most_so_narrow(image).flip(0).permute(1, 2, 0).contiguous().numpy()
    with _DETECTING:  # it keeps intermediate results in attributes
        found = _detector()(bgr, use_det=True, use_rec=False).boxes
    boxes = np.zeros((0, 4, 2)) if found is None else found
    corners = np.concatenate([np.floor(boxes.min(axis=1)), np.ceil(boxes.max(axis=1))], axis=1).clip(0).astype(int)
    pieces = [image[:, top:bottom, left:right] for left, top, right, bottom in corners[reading_order(corners)]]
    return [piece for piece in pieces if piece.numel()] or [image]
