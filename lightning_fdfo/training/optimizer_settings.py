"""The settings of an optimiser and its scheduler: a checkpoint's against a configuration's, and which of them win.

On a resume an optimiser's settings (learning rate, betas, weight decay, …) are the checkpoint's, as its moments are;
those that the command line names are the configuration's. A scheduler's state is the checkpoint's, too. It is computed
again, from the first step to the current one, where the learning rate or the scheduler has changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.training.plain_settings import class_path, differences, plain, short

SCHEDULED = {"params", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
"""What is no setting of a group: its weights, and what schedulers add."""
CYCLED = {"lr", "momentum", "betas"}
"""What schedulers with a `max_lr` set, whatever the optimiser was set to."""
NEWER = {"foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
"""What versions of torch have added to groups, and fill in by themselves."""
MOVING = {"last_epoch", "base_lrs"}
"""Of a scheduler: what is no setting of its own."""

Groups = list[dict[str, Any]]


def optimizer_groups(optimizer: Optimizer) -> Groups:
    """The settings of an optimiser that no scheduler has changed yet, a dictionary a group of weights.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(1))]
        >>> optimizer_groups(torch.optim.SGD(weights, lr=0.5))[0]["lr"]
        0.5
    """
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def optimizer_record(optimizer: Optimizer, groups: Groups) -> dict[str, Any]:
    """Class and settings as plain data, for a checkpoint."""
    return {"class": class_path(optimizer), "groups": plain(groups)}


def scheduler_record(scheduler: LRScheduler | None) -> dict[str, Any] | None:
    """Class and settings of a scheduler as plain data; functions are left out."""
    if scheduler is None:
        return None
    public = {name: value for name, value in vars(scheduler).items() if not name.startswith("_")}
    record: dict[str, Any] = {"class": class_path(scheduler)}
    record |= plain({name: value for name, value in public.items() if name not in {"optimizer", *MOVING}})
    parts = getattr(scheduler, "_schedulers", [])
    if parts:
        milestones = list(getattr(scheduler, "_milestones", []))
        record |= {"milestones": milestones, "schedulers": [scheduler_record(part) for part in parts]}
    return record


def _scheduler_classes(record: Any) -> Any:
    """The class of a recorded scheduler, with those of the schedulers that it is made of; None for none."""
    if not isinstance(record, dict):
        return None
    parts = record.get("schedulers")
    if not isinstance(parts, list) or not parts:
        return record.get("class")
    return f"{record.get('class')} of {', '.join(str(_scheduler_classes(part)) for part in parts)}"


def given_on_command_line(words: Sequence[str]) -> frozenset[str]:
    """Which settings of optimiser and scheduler the words of a command line name.

    Returns:
        Names of the optimiser's settings; `*` for all of them; `lr_scheduler` for the scheduler.

    Example:
        >>> sorted(given_on_command_line(["--model.optimizer.init_args.lr", "5e-2", "--model.lr_scheduler=null"]))
        ['lr', 'lr_scheduler']
    """
    given = set()
    for word in words:
        found = re.match(r"--model\.(optimizer|lr_scheduler)(?:\.(?:init_args\.|dict_kwargs\.)?(\w+))?\+?(?:=|$)", word)
        if found:
            all_settings = found[2] in (None, "class_path", "init_args")
            given.add("lr_scheduler" if found[1] == "lr_scheduler" else "*" if all_settings else found[2])
    return frozenset(given)


@dataclass
class ResumedOptimizer:
    """What a resumed run's optimiser and scheduler are set to.

    Args:
        groups: the settings that count, a dictionary a group.
        changed: names of those that are not the checkpoint's.
        replays: whether the scheduler is computed again.
        replaces: whether it is of another class than the checkpoint's, whose state it cannot take.
        lines: what is reported, a line a setting.
    """

    groups: Groups
    changed: set[str] = field(default_factory=set)
    replays: bool = False
    replaces: bool = False
    lines: list[str] = field(default_factory=list)


def resumed_optimizer(
    saved: Any, optimizer: Optimizer, scheduler: Mapping[str, Any] | None, checkpoint: Mapping[str, Any],
    given: frozenset[str],
) -> ResumedOptimizer:  # fmt: skip
    """Compares a checkpoint's optimiser and scheduler with a configuration's.

    Args:
        saved: the checkpoint's record of settings; an older checkpoint has none.
        optimizer: the configuration's, fresh.
        scheduler: the record of the configuration's scheduler; None without one.
        checkpoint: for what a missing record would say.
        given: names that the command line gives, see `given_on_command_line`.

    Raises:
        ConfigurationError: the checkpoint is of another optimiser.
    """
    record = saved if isinstance(saved, dict) else {}
    own = optimizer_groups(optimizer)
    check_same(record, checkpoint, optimizer)
    theirs = _saved_groups(record, checkpoint)
    if theirs is None:
        return ResumedOptimizer(own)
    if len(theirs) != len(own):
        raise ConfigurationError(
            f"the checkpoint's optimizer has {len(theirs)} groups of weights, the configuration's {len(own)}: set "
            "model.optimizer as it was"
        )
    resumed = ResumedOptimizer([{**mine, **has} for mine, has in zip(own, theirs, strict=True)])
    for number, (mine, has) in enumerate(zip(own, theirs, strict=True)):
        known = {name: value for name, value in plain(mine).items() if name in has}
        for name, is_, wants in differences({name: plain(has[name]) for name in known}, known):
            counts = bool(given & {name, "*"})
            if counts:
                resumed.groups[number][name] = mine[name]
                resumed.changed.add(name)
            place = f"model.optimizer, group {number}" if len(own) > 1 else "model.optimizer"
            resumed.lines.append(_line(f"{place}: {name}", is_, wants, counts, f"--model.optimizer.init_args.{name}"))
    _compare_schedulers(resumed, record, scheduler, checkpoint, given)
    return resumed


def _line(what: str, has: str, wants: str, counts: bool, option: str) -> str:
    if counts:
        return f"{what} is {has} in the checkpoint, {wants} on the command line, which counts"
    return f"{what} is {has} in the checkpoint, which counts, {wants} in the configuration; {option} would change it"


def _saved_groups(record: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> Groups | None:
    """From the record, or from the optimiser's own state; None if neither is there, as where weights are sharded."""
    found = record.get("optimizer")
    groups = found.get("groups") if isinstance(found, dict) else None
    if not groups:
        states = checkpoint.get("optimizer_states") or [{}]
        groups = [_unscheduled(group) for group in states[0].get("param_groups", [])]
    well = isinstance(groups, list) and groups and all(isinstance(group, dict) for group in groups)
    return groups if well else None


def _unscheduled(group: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a group's settings before its scheduler changed them."""
    hidden = SCHEDULED | (CYCLED if "max_lr" in group else set())
    known = {name: value for name, value in group.items() if name not in hidden}
    return known | ({"lr": group["initial_lr"]} if "lr" in known and "initial_lr" in group else {})


def check_same(record: Mapping[str, Any], checkpoint: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Raises ConfigurationError if a checkpoint is of another optimiser.

    An older checkpoint does not name its optimiser's class, but its settings have names.

    Args:
        record: the checkpoint's record of settings; empty in an older one.
        checkpoint: the checkpoint.
        optimizer: the configuration's, of any weights.
    """
    found = record.get("optimizer")
    has = found.get("class") if isinstance(found, dict) else None
    wants = class_path(optimizer)
    if has is None and (theirs := _saved_groups(record, checkpoint)):
        names, needed = (set(groups[0]) - NEWER - CYCLED for groups in (theirs, optimizer_groups(optimizer)))
        has = wants if names == needed else f"one with the settings {', '.join(sorted(map(str, names)))}"
    if has not in (None, wants):
        raise ConfigurationError(
            f"the checkpoint's optimizer is {short(has)}, the configuration's {short(wants)}, which cannot continue "
            "from its state: set model.optimizer as it was, or start again from the exported LoRA by "
            "--model.lora.init_lora"
        )


def _compare_schedulers(
    resumed: ResumedOptimizer, record: Mapping[str, Any], own: Mapping[str, Any] | None,
    checkpoint: Mapping[str, Any], given: frozenset[str],
) -> None:  # fmt: skip
    had = bool(checkpoint.get("lr_schedulers"))
    unknown = {"class": "a scheduler"} if had else None
    theirs = record.get("lr_scheduler", unknown)
    is_, wants = _scheduler_classes(theirs), _scheduler_classes(own)
    if theirs is unknown and had and own is not None:
        is_ = wants  # an older checkpoint, which does not say more
    if is_ != wants:
        resumed.lines.append(
            f"model.lr_scheduler is {short(is_)} in the checkpoint, {short(wants)} in the configuration, which counts"
        )
        resumed.changed |= CYCLED & set(resumed.groups[0])
        resumed.replaces = True
    elif theirs is not unknown:
        for name, has, value in differences(theirs, own):
            counts = "lr_scheduler" in given
            resumed.replays |= counts
            option = f"--model.lr_scheduler.init_args.{name}"
            resumed.lines.append(_line(f"model.lr_scheduler: {name}", has, value, counts, option))
    resumed.replays = own is not None and (resumed.replays or bool(resumed.changed))
