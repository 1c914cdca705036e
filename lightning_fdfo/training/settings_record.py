"""A record of the settings that a run trains with, in each checkpoint, and how another configuration differs from it.

The record is plain data: dictionaries, lists, strings and numbers. It is compared, and never executed; nothing of it
takes a configuration's place.
"""

from __future__ import annotations

import functools
import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward import Reward
from lightning_fdfo.reward_origin import made_with, source_of
from lightning_fdfo.reward_term import RewardTerm

if TYPE_CHECKING:
    from lightning_fdfo.module import FDFOModule

FLOW_SETTINGS = ("dtype", "max_sequence_length", "quantization", "revision")
"""Of a base model, beside its class and name: those that change its velocities."""
MAX_LINES = 30
"""Differences that are reported one by one."""

MAX_TEXT = 120
"""Characters of a value in a line."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = MAX_TEXT
_ABSENT = object()


def settings_record(module: FDFOModule) -> dict[str, Any]:
    """The settings of a module, its trainer and its prompts that a run's result depends on, as plain data.

    Args:
        module: attached to a trainer.

    Returns:
        Names as in a configuration -> values.
    """
    trainer = module.trainer
    data = getattr(trainer, "datamodule", None)
    sampling = asdict(module.sampling)
    del sampling["rollout_batch_size"]  # sets memory only
    pretrained = Path(str(getattr(module.flow, "pretrained", "")))
    flow = {name: str(getattr(module.flow, name)) for name in FLOW_SETTINGS if hasattr(module.flow, name)}
    model = {
        "flow": {"class": class_path(module.flow)}
        | ({"pretrained": pretrained.name if pretrained.is_absolute() else str(pretrained)} if pretrained.name else {})
        | flow,
        "rewards": {name: _term_record(term) for name, term in module.rewards.terms.items()},
        "sampling": sampling,
        "num_pairs": module.num_pairs,
        "updates_per_epoch": module.updates_per_epoch,
        "num_points_per_pair": module.num_points_per_pair,
        "objective": asdict(module.objective),
        "lora": None if module.lora is None else {"dropout": module.lora.dropout},
        "on_reward_error": module.on_reward_error,
    }
    record = {
        "model": model,
        "data": {name: prompt_digest(getattr(data, f"{name}_prompts", ())) for name in ("train", "val")},
        "trainer": {"gradient_clip_val": trainer.gradient_clip_val, "precision": trainer.precision},
    }
    result: dict[str, Any] = plain(record)
    return result


def _term_record(term: RewardTerm) -> dict[str, Any]:
    fields = {name: getattr(term, name) for name in ("weight", "scale", "clip")}
    reward = term.reward
    options: Mapping[str, Any]
    if isinstance(reward, functools.partial):
        options = reward.keywords
        reward = reward.func
    elif isinstance(reward, Reward):  # not its attributes, which scoring may change
        options = made_with(reward)
        reward = source_of(reward)
    else:
        options = {name: value for name, value in vars(reward).items() if not name.startswith("_")}
    gate = None if term.gate is None else asdict(term.gate)
    return {"class": class_path(reward), **fields, "gate": gate, "options": options}


def class_path(value: Any) -> str:
    """Where the class of an object, or a function itself, is defined.

    Example:
        >>> class_path(Path("a")).rpartition(".")[2], class_path(class_path)
        ('PosixPath', 'lightning_fdfo.training.settings_record.class_path')
    """
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def prompt_digest(prompts: Sequence[Prompt]) -> str | None:
    """Says which prompts they are: their number, and a digest of texts, negative prompts and metadata; None for none.

    Example:
        >>> prompt_digest([Prompt("a cat", "", {}, "prompts.txt:1")])
        '1 prompts, digest 405ff0b46d5e'
    """
    if not prompts:
        return None
    rows = [[prompt.text, prompt.negative, prompt.metadata] for prompt in prompts]
    text = json.dumps(rows, sort_keys=True, default=str)
    return f"{len(prompts)} prompts, digest {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def plain(value: Any) -> Any:
    """A value as dictionaries, lists, strings and numbers; what is none of these is left out of what holds it.

    Example:
        >>> plain({"betas": (0.9, 0.99), "call": print, 3: None})
        {'betas': [0.9, 0.99], 3: None}
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        items = {key if type(key) in (int, str) else str(key): plain(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not _ABSENT}
    if isinstance(value, list | tuple):
        return [item for item in map(plain, value) if item is not _ABSENT]
    return None if value is None else _ABSENT


def short(value: Any) -> str:
    """A value in a few characters, none of which controls a terminal."""
    text = "nothing" if value is _ABSENT else _SHORT.repr(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def differences(saved: Any, own: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two records differ, each place once.

    Args:
        saved: a checkpoint's; it may come from anywhere.
        own: a configuration's.
        name: of what is compared.

    Yields:
        Name, what the checkpoint has, what the configuration has.

    Example:
        >>> list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}))
        [('a.c', '2', '3'), ('d', 'nothing', '4')]
    """
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in [*own, *(key for key in saved if key not in own)]:
            path = f"{name}.{short(key).strip(chr(39))}" if name else str(key)
            yield from differences(saved.get(key, _ABSENT), own.get(key, _ABSENT), path)
    elif type(saved) is not type(own) or saved != own:
        yield name, short(saved), short(own)


def difference_lines(saved: Any, own: Mapping[str, Any]) -> list[str]:
    """One line for each setting that is not the checkpoint's; the configuration's counts.

    Args:
        saved: a checkpoint's record; anything else, as an older checkpoint has, gives no lines.
        own: the configuration's.

    Example:
        >>> difference_lines({"model": {"num_pairs": 48}}, {"model": {"num_pairs": 24}})
        ['model.num_pairs: 48 in the checkpoint, 24 in the configuration, which counts']
    """
    if not isinstance(saved, dict):
        return []
    known = {name: value for name, value in own.items() if name in saved}
    found = differences({name: saved[name] for name in known}, known)
    said = "{}: {} in the checkpoint, {} in the configuration, which counts"
    lines = [said.format(*difference) for difference in found]
    more = len(lines) - MAX_LINES
    return [*lines[:MAX_LINES], f"{more} more settings differ from the checkpoint's"] if more > 0 else lines
