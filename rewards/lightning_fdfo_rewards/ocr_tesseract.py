"""Tesseract as the OCR reward uses it: where its language data lie, and what it reads in an image.

The engine is in tesserocr's wheel, the data of its languages come with the system.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from functools import cache
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError

DATA_FOLDERS = (
    "/usr/share/tesseract-ocr/*/tessdata",  # Debian, Ubuntu
    "/usr/share/tessdata",  # Arch, Alpine
    "/usr/share/tesseract/tessdata",  # Fedora
    "/usr/local/share/tessdata",
    "/opt/homebrew/share/tessdata",
    f"{sys.prefix}/share/tessdata",  # conda
)
"""Where data are looked for if TESSDATA_PREFIX is not set."""

MIN_SIDE = 128
"""Smaller images are enlarged to it: letters of a few pixels are read better so."""

_LOADING = threading.Lock()


class Tesseract:
    """Tesseract with the data of some languages; may be called from any thread."""

    def __init__(self, languages: tuple[str, ...]) -> None:
        self._module = import_tesserocr()
        folder = find_data(languages)
        try:
            self._api = self._module.PyTessBaseAPI(path=str(folder), lang="+".join(languages))
        except RuntimeError as error:
            raise ConfigurationError(f"OCR: tesseract cannot load {languages} from {folder}: {error}") from error
        self._api.SetVariable("debug_file", os.devnull)  # it writes to the terminal of blank images
        self._reading = threading.Lock()  # one image at a time is in its memory

    def read(self, image: Tensor, detect: bool) -> str:
        """The text in an image.

        Args:
            image: uint8 [3, H, W], RGB.
            detect: look for lines of text, instead of taking the image for one line.
        """
        modes = self._module.PSM
        picture = _enlarge(image)
        with self._reading:
            found = self._read(picture, modes.AUTO) if detect else ""
            return found if found.strip() else self._read(picture, modes.SINGLE_LINE)

    def _read(self, picture: Image.Image, mode: Any) -> str:
        self._api.SetPageSegMode(mode)
        self._api.SetImage(picture)
        self._api.SetSourceResolution(70)  # unknown; said, so that it is not guessed with a warning
        return str(self._api.GetUTF8Text())


def load_tesseract(languages: tuple[str, ...]) -> Tesseract:
    """The engine of these languages, loaded once a process.

    Raises:
        ConfigurationError: no tesserocr; no data of a language.
    """
    with _LOADING:  # two rewards may be set up in two threads
        return _load(languages)


_load = cache(Tesseract)


def import_tesserocr() -> ModuleType:
    """The module tesserocr; raises ConfigurationError if it is not installed."""
    try:
        import tesserocr  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigurationError(
            f"OCR: backend tesseract needs tesserocr ({error}): pip install 'lightning-fdfo-rewards[tesseract]'"
        ) from error
    module: ModuleType = tesserocr
    return module


def find_data(languages: Sequence[str]) -> Path:
    """The folder with the `.traineddata` of all languages: TESSDATA_PREFIX if that is set, else a usual place.

    Raises:
        ConfigurationError: none has all of them.
    """
    prefix = os.environ.get("TESSDATA_PREFIX")
    # What the variable names is the folder of the data, or, in tesseract 3's days, the one above it.
    patterns = DATA_FOLDERS if not prefix else (prefix, f"{prefix}/tessdata")
    folders = [Path(folder) for pattern in patterns for folder in sorted(glob(pattern), reverse=True)]
    for folder in folders:
        if all((folder / f"{language}.traineddata").is_file() for language in languages):
            return folder
    there = {str(folder): sorted(file.stem for file in folder.glob("*.traineddata")) for folder in folders}
    found = "; ".join(f"{folder}: {', '.join(names) or 'none'}" for folder, names in there.items())
    raise ConfigurationError(
        f"OCR: expected tesseract's data of languages {list(languages)} in one folder, found "
        f"{found or f'no folder among {list(patterns)}'}; install them, e.g. apt-get install tesseract-ocr-eng for eng "
        "(the names are tesseract's: eng, deu, chi_sim), or set TESSDATA_PREFIX to their folder"
    )


def _enlarge(image: Tensor) -> Image.Image:
    """As a Pillow image with sides of at least MIN_SIDE."""
    factor = MIN_SIDE / min(image.shape[1:])
    if factor > 1:
        size = [round(side * factor) for side in image.shape[1:]]
        image = F.interpolate(image[None].float(), size, mode="bicubic").clamp(0, 255).round().byte()[0]
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
