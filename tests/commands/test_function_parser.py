"""Commands made of functions: what a signature and a docstring become."""

from argparse import SUPPRESS
from pathlib import Path
from typing import Literal

import pytest

from lightning_fdfo.commands.export import export
from lightning_fdfo.commands.function_parser import function_parser, run_function
from lightning_fdfo.commands.report import write_report
from lightning_fdfo.commands.rewards import check, score
from lightning_fdfo.commands.serve_reward import serve
from lightning_fdfo.errors import ConfigurationError


def bake(
    name: str,
    *,
    topping: list[str],
    oven: Path | None = None,
    form: Literal["round", "square"] | None = None,
    minutes: int = 20,
    slice: bool = False,
) -> tuple:
    """Bakes a pizza.

    It takes a while.

    Args:
        name: of the pizza
        topping: what lies on it
        oven: where it is baked
        form: round (default) or square
        minutes: in the oven
        slice: cuts it

    Returns:
        What was asked for.
    """
    return name, topping, oven, form, minutes, slice


def called(*words):
    return run_function(bake, "bake", words)


def test_values_have_the_types_of_the_signature():
    assert called("12", "--topping", "7") == ("12", ["7"], None, None, 20, False)
    words = ["--topping", "a", "x", "--oven", "3", "--form", "square", "--minutes=5", "--slice", "--topping", "{b: c}"]
    assert called(*words) == ("x", ["a", "{b: c}"], Path("3"), "square", 5, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: name, --topping"),
        (["x"], "the following arguments are required: --topping"),
        (["x", "y", "--topping", "a"], "unrecognized arguments: y"),
        (["x", "--topping", "a", "--bottom", "b"], "unrecognized arguments: --bottom b"),
        (["x", "--topping", "a", "--minutes", "few"], "argument --minutes: invalid int value: 'few'"),
        (["x", "--topping", "a", "--form", "oval"], "argument --form: invalid choice: 'oval'"),
        (["x", "--topping"], "argument --topping: expected one argument"),
    ],
)
def test_a_mistake_is_one_sentence_that_leads_to_the_help(words, message):
    with pytest.raises(ConfigurationError) as refused:
        called(*words)
    assert str(refused.value).startswith(f"bake: {message}")
    assert str(refused.value).endswith("; see bake --help")


def test_the_help_is_the_docstring(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        called("--help")
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "Bakes a pizza. It takes a while.\n" in said
    for line in ("of the pizza", "--form {round,square}", "round (default) or square\n", "in the oven (default: 20)"):
        assert line in said
    assert not {"Returns", "type:", "null", "False"} & set(said.split())


@pytest.mark.parametrize(
    "function", [check, export, score, serve, write_report], ids=lambda function: function.__name__
)
def test_every_option_of_the_commands_is_explained(function):
    actions = function_parser(function, "command")._actions
    assert [action.dest for action in actions if not action.help] == []
    assert all("(default:" not in action.help for action in actions if action.help is not SUPPRESS)
