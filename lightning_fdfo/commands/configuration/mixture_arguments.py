"""`--model.rewards.NAME VALUE`: changes one value of a mixture's term, and leaves the rest as the files have it.

    --model.rewards.OCR 0.3                        the weight, whether the files give OCR in the short form or the long
    --model.rewards.small.weight "{0: 1, 20: 0.3}"
    --model.rewards.small.gate.above 0.9
    --model.evaluation.metrics.exact_match.reward.init_args.detect true

A new name and a weight add a term.

Why the parser does not do this, with a mixture of the type `dict[str, float | RewardTerm]`: it would put `0.3` in the
place of a long form, knows no key below a short form or a dotted name, takes no single option of a reward, and lays
the terms of a second file over those of the first, where a mixture replaces a mixture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser, get_loader

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.term import KEYS

MIXTURES = ("model.rewards", "model.evaluation.metrics")
_OPTION = re.compile(rf"--({'|'.join(map(re.escape, MIXTURES))})\.([^=]+)(?:=(.*))?", flags=re.DOTALL)


class Change(NamedTuple):
    """`--MIXTURE.PATH TEXT`: one value, as it was written."""

    mixture: str
    path: str
    text: str


def with_changes(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """A command line in which changes of mixtures have become complete mixtures, at its end.

    Args:
        parser: of the command line.
        arguments: all of it.

    Raises:
        ConfigurationError: a change without a value, one of something that is not there, or that is not YAML.
    """
    others, changes = split_arguments(arguments)
    if not changes:
        return others
    config = _parse(parser, others)
    mixtures = {change.mixture: config[change.mixture] or {} for change in changes}
    for mixture, path, text in changes:
        try:
            mixtures[mixture] = changed(mixtures[mixture], path, get_loader("yaml")(text))
        except (yaml.YAMLError, ConfigurationError) as error:
            problem = f"not YAML: {text!r}" if isinstance(error, yaml.YAMLError) else str(error)
            raise ConfigurationError(f"--{mixture}.{path}: {problem}") from error
    one_line = {"default_flow_style": True, "width": math.inf, "sort_keys": False}
    return others + [f"--{mixture}={yaml.safe_dump(terms, **one_line)}" for mixture, terms in mixtures.items()]


def _parse(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """The configuration of a command, or of arguments without one; rewards may be missing, and nothing is printed."""
    command = int(bool(arguments) and not arguments[0].startswith("-"))
    rest = [argument for argument in arguments[command:] if not argument.startswith("--print_config")]
    config = parser.parse_args([*arguments[:command], "--model.rewards={}", *rest])
    return config[config["subcommand"]] if command else config


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[Change]]:
    """Takes the changes of mixtures out of a command line.

    Raises:
        ConfigurationError: one without a value.

    Example:
        >>> others, changes = split_arguments(["fit", "--model.rewards.OCR", "0.3", "--model.rewards.small.scale=std"])
        >>> others, [change.path for change in changes], [change.text for change in changes]
        (['fit'], ['OCR', 'small.scale'], ['0.3', 'std'])
    """
    others: list[str] = []
    changes: list[Change] = []
    left = iter(arguments)
    for argument in left:
        if (found := _OPTION.fullmatch(argument)) is None:
            others.append(argument)
            continue
        text = next(left, None) if found[3] is None else found[3]
        if text is None:
            raise ConfigurationError(f"{argument}: expected a value after it")
        changes.append(Change(found[1], found[2], text))
    return others, changes


def changed(mixture: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A mixture with one value changed.

    Args:
        mixture: as a configuration has it.
        path: `NAME`, for the weight, or `NAME.KEY` and so on.
        value: the new one; a mapping with `reward` takes a term's place.

    Raises:
        ConfigurationError: no such term, or nothing to change below a value.

    Example:
        >>> changed({"small": {"reward": "JPEGSize", "scale": "std"}}, "small", 0.3)
        {'small': {'reward': 'JPEGSize', 'scale': 'std', 'weight': 0.3}}
        >>> changed({"OCR": 1.0}, "OCR.scale", "std")
        {'OCR': {'reward': 'OCR', 'weight': 1.0, 'scale': 'std'}}
    """
    terms = deepcopy(dict(mixture))
    name, keys = _split_path(path, terms)
    term = terms.get(name)
    if not keys and (not isinstance(term, dict) or (isinstance(value, Mapping) and "reward" in value)):
        return terms | {name: value}
    node = terms[name] = term if isinstance(term, dict) else {"reward": name, "weight": term}
    *above, last = keys or ["weight"]
    for key in above:
        below = node.get(key) or {}
        node[key] = {"class_path": below} if key == "reward" and isinstance(below, str) else below
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigurationError(f"expected options below {key}, got {node!r}")
    node[last] = value
    return terms


def _split_path(path: str, terms: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A term's name, which may have dots in it, and the keys below; a name that is not there yet has none."""
    name = max((name for name in terms if f"{path}.".startswith(f"{name}.")), key=len, default=path)
    new, *keys = path.split(".")
    if name not in terms and keys and keys[0] in KEYS:
        raise ConfigurationError(f"there is no {new!r} to change, only {', '.join(terms) or 'an empty mixture'}")
    return name, path[len(name) + 1 :].split(".") if name != path else []
