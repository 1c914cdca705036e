"""The parser of configurations: it refuses unknown keys and oversized files, and reports an error in one line."""

from __future__ import annotations

import math
import sys
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lightning_fdfo.commands import exit_code
from lightning_fdfo.commands.configuration.building import Builder
from lightning_fdfo.commands.configuration.parse_errors import explain
from lightning_fdfo.errors import ConfigurationError

MAX_NODES = 100_000
"""Values in a configuration file, each alias counted as what it stands for."""


class FDFOArgumentParser(LightningArgumentParser):
    """Says an error in one line, bounds what a configuration file unfolds to, and knows which files it has read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config_files: list[Path] = []

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parses a configuration file that is text, and of a size that can be."""
        self.config_files.append(Path(cfg_path))
        try:
            _check_yaml(Path(cfg_path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            self.error(f"{cfg_path}: {'nested too deeply' if isinstance(error, RecursionError) else error}")
        except (OSError, yaml.YAMLError):
            pass  # the parser's own message is good
        return super().parse_path(cfg_path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong and exits with 2; a settings object's own message takes the place of the parser's."""
        message = exit_code.one_line(find_configuration_error(ex) or explain(self, message))
        given = any(word.partition("=")[0] in ("--config", "-c") for word in sys.argv)
        text = message if given else f"{message} (no configuration was given: --config FILE)"
        exit_code.end(exit_code.ErrorReport(text))

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Builds what a configuration names; what a class refuses is one line."""
        builder = Builder(cfg.as_dict())
        with builder.in_one_line():
            return self.instantiate(cfg, instantiators=[(builder, object, True)], **kwargs)


def find_configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """The error that a settings object has raised, below what the parser has made of it; None if there is none."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error


def _check_yaml(text: str) -> None:
    """Raises ValueError for aliases that unfold to more than `MAX_NODES` values, or hold themselves."""
    sizes: dict[int, float] = {}

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # a node that holds itself finds this
            children = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(map(size, children)))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and size(root) > MAX_NODES:
        raise ValueError(f"expected at most {MAX_NODES} values, aliases unfolded")
