"""What a run prints beside its numbers."""

import warnings
from importlib import import_module

import pytest

from lightning_fdfo.commands.console import _format_warning


@pytest.mark.parametrize("module", ["data", "commands.cli", "reward.mix"])
def test_a_warning_of_this_package_is_one_line(module):
    file = import_module(f"lightning_fdfo.{module}").__file__
    assert _format_warning("expected less", UserWarning, file, 3) == "warning: expected less\n"


def test_a_warning_of_another_package_names_its_place():
    text = _format_warning("old", UserWarning, warnings.__file__, 3)
    assert text.startswith(f"{warnings.__file__}:3: UserWarning: old")
