"""When `class_path` changes, arguments of the old class that the new one also accepts are kept; reports which.

For example:

    file:          model.flow: {class_path: StableDiffusion3, init_args: {max_sequence_length: 0, …}}
    command line:  --model.flow.class_path Flux
    message:       model.flow: Flux instead of the file's StableDiffusion3 keeps its max_sequence_length=0, …
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

FLOW, DEFAULT_FLOW = "model.flow", "DiffusersFlow"
"""A setting that may give arguments without a class, and what they are for."""
Given = Mapping[str, Any]
"""A node {class_path, init_args} of a configuration file."""


def changed_classes(config: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """A sentence for each class that is not the one a file gave arguments for: which of these count, which do not.

    Args:
        config: what came of files and command line, as a plain mapping.
        words: of the command line; what they set is not kept, but given.

    Example:
        >>> from tempfile import NamedTemporaryFile
        >>> config = {"model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}}}
        >>> with NamedTemporaryFile("w", suffix=".yaml") as file:
        ...     _ = file.write("model: {optimizer: {class_path: AdamW, init_args: {lr: 0.1, betas: [0.9, 0.99]}}}")
        ...     file.flush()
        ...     changed_classes(config, ["--config", file.name, "--model.optimizer.class_path", "SGD"])
        ["model.optimizer: SGD instead of a file's AdamW: of that one's arguments lr=0.1 is kept, betas is dropped"]
    """
    nodes: dict[str, list[Given]] = {}
    for file in _files(words):
        for path, node in _nodes(yaml.safe_load(file.read_text(encoding="utf-8"))):
            nodes.setdefault(path, []).append(node)
    return [sentence for path, given in nodes.items() for sentence in _sentence(path, given, _at(config, path), words)]


def _files(words: Sequence[str]) -> Iterator[Path]:
    """Configuration files of a command line, in order."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        file = Path(value or after)
        if option in ("--config", "-c") and file.is_file():
            yield file


def _sentence(path: str, given: Sequence[Given], final: Any, words: Sequence[str]) -> Iterator[str]:
    if not isinstance(final, Mapping) or "class_path" not in final:
        return
    name = ""
    others: dict[str, Any] = {}
    for node in given:
        arguments = {key: value for key, value in (node.get("init_args") or {}).items() if value is not None}
        if _class_name(node) == _class_name(final):  # meant for it
            others = {key: value for key, value in others.items() if key not in arguments}
        else:
            name, others = _class_name(node), others | arguments
    taken = final.get("init_args") or {}
    others = {key: value for key, value in others.items() if not _is_set(path, key, words)}
    kept = [f"{key}={value}" for key, value in others.items() if key in taken and _same(taken[key], value)]
    dropped = [key for key in others if key not in taken]
    parts = [f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {what}" for names, what in
             ((kept, "kept"), (dropped, "dropped")) if names]  # fmt: skip
    if parts:
        yield f"{path}: {_class_name(final)} instead of a file's {name}: of that one's arguments {', '.join(parts)}"


def _nodes(value: Any, path: str = "") -> Iterator[tuple[str, Given]]:
    """All {class_path, …} below, by their dotted paths; lists are replaced as a unit, and do not matter here."""
    if not isinstance(value, Mapping):
        return
    if isinstance(value.get("class_path"), str):
        yield path, value
    elif path == FLOW and "init_args" not in value:  # the short form
        yield path, {"class_path": DEFAULT_FLOW, "init_args": value}
    for key, inner in value.items():
        yield from _nodes(inner, f"{path}.{key}" if path else str(key))


def _at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _class_name(node: Given) -> str:
    return str(node["class_path"]).rpartition(".")[2]


def _same(taken: Any, value: Any) -> bool:
    """Whether it is the file's value, of which the parser may have made a tuple."""
    return bool((list(taken) if isinstance(taken, tuple) else taken) == value)


def _is_set(path: str, key: str, words: Sequence[str]) -> bool:
    options = {word.split("=")[0] for word in words}
    return bool(options & {f"--{path}.{key}", f"--{path}.init_args.{key}"})
