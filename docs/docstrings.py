"""Lets mkdocstrings show our docstrings as they are meant."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Names `Example:` as griffe wants it, and keeps a range such as `>= 1` from becoming a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object once all of its docstring is known."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^( +\w+: )>", r"\1\\>", text, flags=re.MULTILINE)
