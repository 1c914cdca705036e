"""Whether a run can learn: what its settings say before a model is loaded, and what an epoch's pairs say afterwards.

A pair teaches by the difference of its two scores. Where all differences are 0 (constant scores, a gate that is shut,
equal images) the gradient is 0, and a run would end as it began, without an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fdfo.checkpoints.replayed_scheduler import replayed
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.scores import EpochScores
from lightning_fdfo.schedules import churn_schedule
from lightning_fdfo.training.optimizer_settings import optimizer_groups
from lightning_fdfo.training.optimizers import build_optimizer

if TYPE_CHECKING:
    from lightning_fdfo.module import FDFOModule

MANY_TIES = 0.5
"""Share of a reward's pairs above which ties are reported."""
FEW_VALUES = 0.1
"""Different scores per image at or below which scores count as rounded."""
MAX_STEPS = 10_000
"""Of a scheduler that are looked at."""


def cannot_learn(module: FDFOModule, max_epochs: int | None) -> list[str]:
    """Settings by which no weight would change, a sentence each; needs no model.

    Args:
        module: its settings.
        max_epochs: the trainer's; None, -1 or 0 (as the doctor has it) for no limit.
    """
    sampling = module.sampling
    found = []
    if all(_weightless(term, max_epochs) for term in module.rewards.terms.values()):
        names = ", ".join(module.rewards.terms)
        found.append(
            f"rewards: all weights are 0 in all epochs ({names}), so that nothing trains: give one a weight, or use "
            "lightning-fdfo validate, which scores without training"
        )
    with suppress(ValueError):  # a negative one has its own error
        steps = min(sampling.num_steps, 2)  # all but the last have the same churn, and there may be a billion
        schedule = churn_schedule(sampling.churn, steps, initial_churn=sampling.initial_churn)
        if not schedule.any():
            found.append(
                f"sampling: with churn {sampling.churn} and initial_churn {sampling.initial_churn} at "
                f"{sampling.num_steps} steps the two images of every pair are equal, so that nothing trains: expected "
                "a churn above 0, such as the paper's 0.0025"
            )
    if _no_rate(module, max_epochs):
        found.append(
            "optimizer: the learning rate is 0 at every step, so that nothing trains: expected lr above 0, or an "
            "lr_scheduler that raises it"
        )
    return found


def _weightless(term: RewardTerm, max_epochs: int | None) -> bool:
    """Whether a term has no weight in any epoch of the run; between the epochs that are named it is linear."""
    if not isinstance(term.weight, Mapping):
        return term.weight == 0
    last = max_epochs - 1 if max_epochs and max_epochs > 0 else max(term.weight)
    return not any(term.weight_at(epoch) for epoch in {0, last, *(key for key in term.weight if key < last)})


def _no_rate(module: FDFOModule, max_epochs: int | None) -> bool:
    """Whether the learning rate is 0 at every step; what an optimiser refuses is reported elsewhere."""
    try:
        optimizer = build_optimizer(module.optimizer, [torch.nn.Parameter(torch.zeros(1))])
        groups = optimizer_groups(optimizer)
        if module.lr_scheduler is None or any(group["lr"] for group in groups):
            return not any(group["lr"] for group in groups)
        epochs = max_epochs if max_epochs and max_epochs > 0 else MAX_STEPS
        twin, _ = replayed(module.lr_scheduler, optimizer, groups, 0)
        for _ in range(min(epochs * module.batching.updates_per_epoch, MAX_STEPS)):
            if any(twin.get_last_lr()):
                return False
            twin.optimizer._opt_called = True  # type: ignore[attr-defined]  # it has nothing to update
            twin.step()
    except ConfigurationError:
        return False
    return True


def nothing_learned(scores: EpochScores, rewards: RewardMix, epoch: int) -> Iterator[tuple[str, str]]:
    """What teaches nothing, or little, in an epoch, and why that may be.

    Args:
        scores: of the epoch's pairs, over all devices.
        rewards: the mixture.
        epoch: the current one.

    Yields:
        A key, so that each thing is reported once (a reward's name; empty for the mixture), and a sentence.
    """
    weighted = [name for name, term in rewards.terms.items() if term.weight_at(epoch)]
    if not scores.difference.any():
        equal = not scores.distance[scores.kept_rows].any()
        why = "the two images of each pair are equal: raise sampling.churn" if equal else None
        why = why or ("no reward has a weight" if not weighted else "no reward tells the images of a pair apart")
        pairs = int(scores.kept.sum())
        yield "", f"none of the {pairs} pairs of epoch {epoch} has a difference, so that nothing trains in it: {why}"
    for name in weighted:
        if sentence := _ties(name, scores, rewards):
            yield name, sentence


def _ties(name: str, epoch_scores: EpochScores, rewards: RewardMix) -> str | None:
    """A sentence about a term that teaches nothing, or little; None if it does."""
    differences, compared = epoch_scores.differences[name]
    if not compared.any():
        return f"reward {name}: no prompt of the epoch names it in its rewards, so that it teaches nothing"
    passing = rewards.passes(name, epoch_scores.scores)
    gate = rewards.terms[name].gate
    if gate is not None and not (passing & compared).any():
        other = epoch_scores.scores[gate.reward]
        others = other.values[other.scored & epoch_scores.kept_rows]
        span = f"{others.min().item():.4g} to {others.max().item():.4g}" if len(others) else "none"
        return (
            f"reward {name}: its gate ({gate.reward} above {gate.above:g}, below {gate.below:g}) lets no pair pass, so "
            f"that it teaches nothing until it opens; {gate.reward} scored {span}"
        )
    ties = differences[compared] == 0
    share = ties.double().mean().item()
    if share <= MANY_TIES:
        return None
    found = f"{int(ties.sum()) // 2} of {len(ties) // 2} pairs score alike, and teach nothing"
    cause = _cause(epoch_scores.scores[name].values[compared], epoch_scores.distance[compared], ties)
    return f"reward {name}: {found}: {cause}"


def _cause(scores: Tensor, distance: Tensor, ties: Tensor) -> str:
    """Why scores tie."""
    values = torch.unique(scores)
    if not distance[ties].any():
        return "the two images of these pairs are equal: raise sampling.churn"
    if len(values) == 1:
        return f"the score is constant, {values[0].item():.4g} for every image"
    if len(values) <= max(2.0, FEW_VALUES * len(scores)):
        return f"the scores take {len(values)} different values: they are rounded, or a yes or no; use a smoother score"
    return "the images of a pair are too alike for this reward: raise sampling.churn, or use a smoother score"
