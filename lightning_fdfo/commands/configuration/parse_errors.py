"""A mistake in a configuration as one sentence, with the class, the key and the file.

Of a class's own options the parser names neither the class nor the key: both are found on the stack, where it raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_fdfo.commands.configuration.sentences import OPTION, sentence
from lightning_fdfo.flows.base import FlowModel


def explain(parser: ArgumentParser, message: str) -> str:
    """What a parser that is about to end with a message has met; what it was parsing is found on the stack.

    Args:
        parser: the one that raises it; a class's options have a parser of their own.
        message: the parser's.
    """
    stack = list(_callers())
    owners = [frame.f_locals["val_class"] for frame in stack if inspect.isclass(frame.f_locals.get("val_class"))]
    lines = [frame.f_locals.get("args") for frame in stack if frame.f_code.co_name == "parse_args"]
    given = [str(word) for word in next((line for line in reversed(lines) if line), ())]
    commands: Mapping[str, ArgumentParser] = next(
        (action.choices for action in parser._actions if isinstance(action.choices, Mapping)), {}
    )
    accepting = commands.get(given[0], parser) if given else parser
    accepted = [action.dest for action in accepting._actions if not action.dest.endswith("help")]
    accepted = [name for name in accepted if name not in ("config", "print_config")]
    found = OPTION.search(message)
    files = [Path(file) for word, file in pairwise([*given, ""]) if word in ("--config", "-c")]
    files += [Path(word.partition("=")[2]) for word in given if word.startswith("--config=")]
    place = next(places(found["option"], files, given), "") if found else _option(stack)
    return sentence(message, known_classes(), accepted, place, owners[0].__name__ if owners else "")


@cache
def known_classes() -> Mapping[str, tuple[type, ...]]:
    """Classes that have been imported, by the option that may name them."""
    bases: Mapping[str, tuple[type, ...]] = {
        "model.flow": (FlowModel,),
        "model.optimizer": (Optimizer,),
        "model.lr_scheduler": (LRScheduler,),
        "trainer.callbacks": (Callback,),
        "trainer.logger": (Logger,),
        "trainer.plugins": (CheckpointIO, Precision, ClusterEnvironment),
        "trainer.profiler": (Profiler,),
        "trainer.strategy": (Strategy,),
    }
    return {key: tuple(chain.from_iterable(map(_subclasses, kinds))) for key, kinds in bases.items()}


def _subclasses(kind: type) -> Iterator[type]:
    below: type
    for below in type.__subclasses__(kind):
        yield below
        yield from _subclasses(below)


def _option(stack: Iterable[FrameType]) -> str:
    """The option whose value is parsed: the outermost one with a type."""
    parts = [frame.f_locals.get("self") for frame in stack]
    return next((str(part.dest) for part in reversed(parts) if hasattr(part, "_typehint")), "")


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def places(option: str, files: Iterable[Path], arguments: Iterable[str]) -> Iterator[str]:
    """Full keys that end in an option, with the file where one is.

    Args:
        option: a key, or the end of one.
        files: configurations.
        arguments: of the command line.
    """
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("-").rstrip("+")
        if argument.startswith("--") and f".{key}".endswith(f".{option}"):
            yield key
    for file in files:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        yield from (f"{file}: {key}" for key in _keys(content) if f".{key}".endswith(f".{option}"))


def _keys(node: Any, above: str = "") -> Iterator[str]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, below in items:
        key = f"{above}.{name}" if above else str(name)
        yield key
        yield from _keys(below, key)
