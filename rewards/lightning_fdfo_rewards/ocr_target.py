"""Which text an image should show: a prompt's metadata say so, or the quotes in it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward import Metadata

_DOUBLE = re.compile(
    r'(?<!\d)"([^"]*)"'  # after a digit it stands for inches
    r"|“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»|»([^«]*)«|「([^」]*)」|『([^』]*)』"
)
_SINGLE = re.compile(r"(?<!\w)'(?=\S)(.+?)(?<=\S)'(?!\w)|‘([^‘]*?)’(?!\w)|‚([^‘’]*)[‘’]")
"""Between words: an apostrophe, as in `dogs' bowls` or `don't`, opens nothing."""

QUOTES = "\"…\", “…”, „…“, «…», 「…」, 『…』 or '…'"


def target_text(prompt: str, metadata: Metadata) -> str:
    """The text that an image should show, without spaces.

    The metadata's `text`, if there is one. Otherwise what stands in the prompt's first pair of quotes with a letter or
    a digit between them; single quotes count where there are no others.

    Raises:
        ConfigurationError: there is none, or `text` is no text.

    Example:
        >>> target_text("a sign", {"text": "New York"}), target_text('a 5" nail and a sign "HELLO"', {})
        ('NewYork', 'HELLO')
    """
    text = metadata.get("text")
    if text is None:
        found = (_joined(quoted) for quoted in _quoted(prompt))
        target = next((one for one in found if normalise(one)), None)
        if target is None:
            raise ConfigurationError(
                f'OCR needs metadata "text" or text in quotes in the prompt ({QUOTES}, with a letter or a digit in it; '
                f'a " after a digit is taken for inches), got {prompt[:80]!r}'
            )
        return target
    if isinstance(text, bool) or not isinstance(text, str | int) or not normalise(str(text)):
        raise ConfigurationError(
            f'OCR: expected metadata "text" to be a string with a letter or a digit, got {repr(text)[:80]}; of several '
            'texts in an image make one string, in the order of reading, as "NEW YORK"'
        )
    return _joined(str(text))


def _quoted(prompt: str) -> Iterator[str]:
    for pattern in (_DOUBLE, _SINGLE):
        for match in pattern.finditer(prompt):
            yield next(group for group in match.groups() if group is not None)


def _joined(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())  # é is one character to a recogniser


def normalise(text: str) -> str:
    """Lower case, letters and digits only, wide and narrow forms as one.

    Example:
        >>> normalise("New-York 7!")
        'newyork7'
    """
    return "".join(character for character in unicodedata.normalize("NFKC", text).lower() if character.isalnum())


def check_alphabet(target: str, alphabet: frozenset[str], engine: str) -> None:
    """Checks that an engine can read a target, of which letters and digits are compared.

    Args:
        target: see `target_text`.
        alphabet: what the engine can read, as `normalised` gives it.
        engine: what messages call it.

    Raises:
        ConfigurationError: it never reads one of the characters.

    Example:
        >>> check_alphabet("7-11", normalised("0123456789"), "the engine")
    """
    unknown = sorted({character for character in normalise(target) if character not in alphabet})
    if unknown:
        raise ConfigurationError(unknown_characters(unknown, target, engine))


def unknown_characters(unknown: list[str], target: str, engine: str) -> str:
    """The message for characters that an engine never reads."""
    return f"OCR: {engine} does not know {unknown} in {target!r}; give `languages` that have them"


def normalised(characters: Iterable[str]) -> frozenset[str]:
    """All characters that `normalise` can leave of texts of these."""
    return frozenset("".join(normalise(character) for character in characters))
