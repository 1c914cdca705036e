"""A record, in each checkpoint, of the settings that a run trains with; and how another configuration differs from it.

The record is plain data: dictionaries, lists, strings and numbers. It is compared, and never executed; nothing of it
takes a configuration's place.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.base import BaseReward
from lightning_fdfo.reward.origin import made_with, source_of
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.schedules import ChurnSchedule
from lightning_fdfo.training.plain_settings import class_path, differences, plain
from lightning_fdfo.training.protocol import TrainingModule

FLOW_SETTINGS = ("dtype", "max_sequence_length", "quantization", "revision")
"""Of a base model, beside its class and name: those that change its velocities."""
MAX_LINES = 30
"""Differences that are reported one by one."""


def settings_record(module: TrainingModule) -> dict[str, Any]:
    """The settings of a module, its trainer and its prompts that a run's result depends on, as plain data.

    Args:
        module: attached to a trainer.

    Returns:
        Names as in a configuration -> values.
    """
    trainer = module.trainer
    data = getattr(trainer, "datamodule", None)
    batching = asdict(module.batching)
    for sets_memory_only in ("batch_size", "rollout_batch_size"):
        del batching[sets_memory_only]
    pretrained = Path(str(getattr(module.flow, "pretrained", "")))
    flow = {name: str(getattr(module.flow, name)) for name in FLOW_SETTINGS if hasattr(module.flow, name)}
    model = {
        "flow": {"class": class_path(module.flow)}
        | ({"pretrained": pretrained.name if pretrained.is_absolute() else str(pretrained)} if pretrained.name else {})
        | flow,
        "rewards": {name: _term_record(term) for name, term in module.rewards.terms.items()},
        "sampling": asdict(module.sampling) | {"churn": _made_of(module.sampling.churn)},
        "batching": batching,
        "objective": asdict(module.objective),
        "algorithm": _made_of(module.algorithm),
        "lora": None if module.lora is None else {"dropout": module.lora.dropout},
        "failures": {"on_reward_error": module.failures.on_reward_error},
    }
    record = {
        "model": model,
        "data": {name: prompt_digest(getattr(data, f"{name}_prompts", ())) for name in ("train", "val")},
        "trainer": {"gradient_clip_val": trainer.gradient_clip_val, "precision": trainer.precision},
    }
    result: dict[str, Any] = plain(record)
    return result


def _made_of(value: Any) -> Any:
    """A schedule or an algorithm by its class and public attributes; a number, or None, as it is."""
    if value is None or isinstance(value, int | float):
        return value
    options = {name: _made_of(each) if isinstance(each, ChurnSchedule) else each for name, each in vars(value).items()}
    return {"class": class_path(value), **{name: each for name, each in options.items() if not name.startswith("_")}}


def _term_record(term: RewardTerm) -> dict[str, Any]:
    fields = {name: getattr(term, name) for name in ("weight", "scale", "clip", "gradient")}
    reward = term.reward
    options: Mapping[str, Any]
    if isinstance(reward, functools.partial):
        options = reward.keywords
        reward = reward.func
    elif isinstance(reward, BaseReward):  # not its attributes, which scoring may change
        options = made_with(reward)
        reward = source_of(reward)
    else:
        options = {name: value for name, value in vars(reward).items() if not name.startswith("_")}
    gate = None if term.gate is None else asdict(term.gate)
    return {"class": class_path(reward), **fields, "gate": gate, "options": options}


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


def difference_lines(saved: Any, own: Mapping[str, Any]) -> list[str]:
    """One line for each setting that is not the checkpoint's; the configuration's counts.

    Args:
        saved: a checkpoint's record; anything else, as an older checkpoint has, gives no lines.
        own: the configuration's.

    Example:
        >>> difference_lines({"model": {"batching": {"num_pairs": 48}}}, {"model": {"batching": {"num_pairs": 24}}})
        ['model.batching.num_pairs: 48 in the checkpoint, 24 in the configuration, which counts']
    """
    if not isinstance(saved, dict):
        return []
    known = {name: value for name, value in own.items() if name in saved}
    found = differences({name: saved[name] for name in known}, known)
    said = "{}: {} in the checkpoint, {} in the configuration, which counts"
    lines = [said.format(*difference) for difference in found]
    more = len(lines) - MAX_LINES
    return [*lines[:MAX_LINES], f"{more} more settings differ from the checkpoint's"] if more > 0 else lines
