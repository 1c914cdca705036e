"""Tesseract as the OCR reward uses it: where its language data lie, and what it reads in an image.

The engine is in tesserocr's wheel, the data of its languages come with the system.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections.abc import Sequence
from functools import cache
from glob import glob
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo_rewards.ocr_lines import at_most_so_narrow
from lightning_fdfo_rewards.ocr_target import normalised

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
        self._languages = languages
        self._module = import_tesserocr()
        folder = find_data(languages)
        try:
            self._api = self._module.PyTessBaseAPI(path=str(folder), lang="+".join(languages))
        except RuntimeError as error:
            raise ConfigurationError(f"OCR: tesseract cannot load {languages} from {folder}: {error}") from error
        self._api.SetVariable("debug_file", os.devnull)  # it writes to the terminal of blank images
        self._reading = threading.Lock()  # one image at a time is in its memory

    def __reduce__(self) -> tuple[type[Tesseract], tuple[tuple[str, ...]]]:
        """A copy has a memory of its own."""
        return Tesseract, (self._languages,)

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
        self._api.SetSourceResolution(70)  # unknown; set, so that tesseract does not guess it with a warning
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


_LSTM_UNICHARSET, _UNICHARSET = 21, 1
"""Numbers of the parts of a `.traineddata` file that list what is read, for the newer engine and the older one."""


@cache
def read_alphabet(folder: Path, languages: tuple[str, ...]) -> frozenset[str] | None:
    """Letters and digits that the data of some languages can give, as they are compared; None: the data do not say."""
    listed = [_listed(folder / f"{language}.traineddata") for language in languages]
    known = [characters for characters in listed if characters is not None]
    return normalised(chain.from_iterable(known)) if len(known) == len(listed) else None


def _listed(file: Path) -> list[str] | None:
    """What one language's data list: a header of offsets, and in one part a line of text for each character."""
    try:
        data = file.read_bytes()
        (count,) = struct.unpack_from("<I", data)
        offsets = struct.unpack_from(f"<{count}q", data, 4)
        start = next(offsets[part] for part in (_LSTM_UNICHARSET, _UNICHARSET) if offsets[part] >= 0)
        end = min((offset for offset in offsets if offset > start), default=len(data))
        lines = data[start:end].decode().splitlines()
        named = [line.split(" ", 1)[0] for line in lines[1 : int(lines[0]) + 1]]
    except (OSError, struct.error, StopIteration, IndexError, ValueError):  # of another format
        return None
    return [name for name in named if name not in ("NULL", "Joined", "|Broken|0|1")]


def _enlarge(image: Tensor) -> Image.Image:
    """As a Pillow image with sides of at least MIN_SIDE; a narrow one is padded first."""
    image = at_most_so_narrow(image)
    factor = MIN_SIDE / min(image.shape[1:])
    if factor > 1:
        size = [round(side * factor) for side in image.shape[1:]]
        image = F.interpolate(image[None].float(), size, mode="bicubic").clamp(0, 255).round().byte()[0]
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
