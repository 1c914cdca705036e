"""Arguments of the command line that change one value of a mixture's term, and leave the rest as the files have it.

    --model.rewards.OCR 0.3                        the weight, whether the files give OCR in the short form or the long
    --model.rewards.small.weight "{0: 1, 20: 0.3}"
    --model.rewards.small.gate.above 0.9
    --model.metrics.exact_match.reward.init_args.detect true

A new name and a weight add a term. The parser by itself would put a new term in the old one's place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.term import KEYS

_OPTION = re.compile(r"--model\.(rewards|metrics)\.([^=]+)(?:=(.*))?", flags=re.DOTALL)

Change = tuple[str, str, str]
"""`rewards` or `metrics`, the path in it, and the value as it was written."""


def with_changes(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """A command line in which changes of mixtures have become whole mixtures, at its end.

    Args:
        parser: of the command line.
        arguments: all of it.

    Raises:
        ConfigurationError: a change without a value, one of something that is not there, or that is not YAML.
    """
    others, changes = split_arguments(arguments)
    if not changes:
        return others
    command = int(bool(others) and not others[0].startswith("-"))
    rest = [argument for argument in others[command:] if not argument.startswith("--print_config")]
    config = parser.parse_args([*others[:command], "--model.rewards={}", *rest]).as_dict()
    model = config[config["subcommand"]]["model"] if command else config["model"]
    for mixture, path, text in changes:
        try:
            model[mixture] = changed(model[mixture] or {}, path, get_loader("yaml")(text))
        except (yaml.YAMLError, ConfigurationError) as error:
            problem = f"not YAML: {text!r}" if isinstance(error, yaml.YAMLError) else str(error)
            raise ConfigurationError(f"--model.{mixture}.{path}: {problem}") from error
    whole = {mixture: model[mixture] for mixture, _, _ in changes}
    return others + [f"--model.{mixture}={_one_line(terms)}" for mixture, terms in whole.items()]


def _one_line(terms: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(terms), default_flow_style=True, width=math.inf, sort_keys=False)
    return text


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[Change]]:
    """Takes the changes of mixtures out of a command line.

    Raises:
        ConfigurationError: one without a value.

    Example:
        >>> split_arguments(["fit", "--model.rewards.OCR", "0.3", "--model.rewards.small.scale=std"])
        (['fit'], [('rewards', 'OCR', '0.3'), ('rewards', 'small.scale', 'std')])
    """
    others: list[str] = []
    changes: list[Change] = []
    left = iter(arguments)
    for argument in left:
        if (found := _OPTION.fullmatch(argument)) is None:
            others.append(argument)
            continue
        value = next(left, None) if found[3] is None else found[3]
        if value is None:
            raise ConfigurationError(f"{argument}: expected a value after it")
        changes.append((found[1], found[2], value))
    return others, changes


def changed(mixture: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A mixture with one value changed.

    Args:
        mixture: as a configuration has it.
        path: `NAME`, for the weight, or `NAME.KEY` and so on.
        value: the new one.

    Raises:
        ConfigurationError: no such term, or nothing to change below a value.

    Example:
        >>> changed({"small": {"reward": "JPEGSize", "scale": "std"}}, "small", 0.3)
        {'small': {'reward': 'JPEGSize', 'scale': 'std', 'weight': 0.3}}
        >>> changed({"OCR": 1.0}, "OCR.scale", "std")
        {'OCR': {'reward': 'OCR', 'weight': 1.0, 'scale': 'std'}}
    """
    terms = deepcopy(dict(mixture))
    name = max((name for name in terms if f"{path}.".startswith(f"{name}.")), key=len, default=path)
    term, keys = terms.get(name), path[len(name) + 1 :].split(".")
    new, _, key = path.partition(".")
    if name not in terms and key.partition(".")[0] in KEYS:
        raise ConfigurationError(f"there is no {new!r} to change, only {', '.join(terms) or 'an empty mixture'}")
    if keys == [""]:
        if not isinstance(term, dict) or (isinstance(value, Mapping) and "reward" in value):
            return terms | {name: value}
        keys = ["weight"]
    node = terms[name] = term if isinstance(term, dict) else {"reward": name, "weight": term}
    for key in keys[:-1]:
        below = node.get(key) or {}
        node[key] = {"class_path": below} if key == "reward" and isinstance(below, str) else below
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigurationError(f"expected options below {key}, got {node!r}")
    node[keys[-1]] = value
    return terms
