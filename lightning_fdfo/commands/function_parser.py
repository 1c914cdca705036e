"""A command made of a function: options from its signature, help from its docstring."""

from __future__ import annotations

import inspect
import re
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, get_args

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from lightning_fdfo.errors import ConfigurationError

T = TypeVar("T")

_WRONG_TYPE = re.compile(r"""Parser key "(\w+)":\s+Expected an? <class '(\w+)'>\. Got value: (.*)""", re.DOTALL)


def run_function(function: Callable[..., T], prog: str, arguments: Sequence[str]) -> T:
    """Calls a function with a command line's options.

    Args:
        function: see `function_parser`.
        prog: the command's name.
        arguments: the words after it.

    Returns:
        What the function gives.

    Raises:
        ConfigurationError: options that the function does not have, or values of another type.

    Example:
        >>> def repeat(word: str, times: int = 2) -> str:
        ...     return word * times
        >>> run_function(repeat, "repeat", ["ab", "--times", "3"])
        'ababab'
    """
    return function(**function_parser(function, prog).parse_args(arguments).as_dict())


def function_parser(function: Callable[..., Any], prog: str) -> FunctionParser:
    """The parser of a function's arguments.

    An argument without a default is positional, unless it is keyword-only. A `bool` is a flag without a value, a
    `list[str]` an option that may come several times, and `Literal[…] | None` one with choices.

    Args:
        function: annotated; what its docstring says before and in `Args:` is the command's help.
        prog: the command's name.
    """
    description = re.split(r"\n\s*\n(?:Args|Returns|Raises|Example):", inspect.getdoc(function) or "")[0]
    parser = FunctionParser(prog=prog, description=description, formatter_class=_Help, allow_abbrev=True)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return parser


class FunctionParser(ArgumentParser):
    """Raises an error instead of printing it, so that all commands end alike, see exit_code.py."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        """Adds an argument of a signature."""
        typehint = getattr(kwargs.get("action"), "_typehint", kwargs.get("type"))
        choices = [value for part in get_args(typehint) for value in get_args(part)]  # of Literal["a", "b"] | None
        if typehint is bool:
            kwargs = {"action": "store_true", "help": kwargs.get("help")}
        elif typehint == list[str]:
            args, kwargs = args[:1], {**kwargs, "action": "append"}
        elif choices:
            kwargs = {"choices": choices, "default": kwargs["default"], "help": kwargs.get("help")}
        added: Action = super().add_argument(*args, **kwargs)
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ConfigurationError: what is wrong, and where the options are explained."""
        options = [action.dest for action in self._actions if action.option_strings]
        text = _WRONG_TYPE.sub(r"argument --\1: invalid \2 value: '\3'", message)
        text = re.sub(r"(?<=required: ).*", lambda names: ", ".join(_as_typed(names[0], options)), text)
        raise ConfigurationError(f"{self.prog}: {text}; see {self.prog} --help")


def _as_typed(names: str, options: Sequence[str]) -> Iterator[str]:
    """`folder, reward` -> folder, --reward."""
    return (f"--{name}" if name in options else name for name in names.split(", "))


class _Help(DefaultHelpFormatter):
    """Adds a default where there is one, and leaves out types, which the words say."""

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.default in (None, False, SUPPRESS):
            return text
        return f"{text} (default: {action.default})"
