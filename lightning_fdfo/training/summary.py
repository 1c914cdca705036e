"""What a run prints about its model and its rewards before its first number: one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.plan import BatchPlan


def report_run(mixtures: Sequence[RewardMix], plan: BatchPlan, batch_size: int, folder: str) -> None:
    """Three lines on a run that is about to begin: its rewards, the arithmetic of its epochs, and its folder.

    Args:
        mixtures: the rewards, and the metrics if there are any.
        plan: of an epoch.
        batch_size: what was asked for; a warning says if the plan's is half of it or less, which takes time.
        folder: of the run.
    """
    rank_zero_info(describe_rewards(*(mixture.terms for mixture in mixtures)))
    rank_zero_info(f"Plan: {plan}")
    rank_zero_info(f"Folder: {folder}")
    points = plan.batch_size * plan.batches_per_update
    if 2 * plan.batch_size <= min(batch_size, points):
        rank_zero_warn(
            f"batch_size={batch_size}: no number from {plan.batch_size + 1} to it divides the {points} points of an "
            f"update on a device, which go in batches of {plan.batch_size}: slower than need be; choose a num_pairs "
            "with more divisors"
        )


def describe_model(flow: object) -> str:
    """One line on a base model, known before it is loaded.

    Example:
        >>> from lightning_fdfo.flows import StableDiffusion3
        >>> describe_model(StableDiffusion3("tiny-digits", max_sequence_length=0))
        'Model: tiny-digits (StableDiffusion3)'
    """
    pretrained, kind = getattr(flow, "pretrained", None), type(flow).__name__
    if pretrained is None:
        return f"Model: {kind}"
    return f"Model: {Path(pretrained).name if Path(pretrained).is_dir() else pretrained} ({kind})"


def describe_rewards(terms: Mapping[str, RewardTerm], metrics: Mapping[str, RewardTerm] | None = None) -> str:
    """One line on a mixture and on what validation scores beside it.

    Example:
        >>> from lightning_fdfo.reward.term import parse_terms
        >>> describe_rewards(parse_terms({"OCR": 1.0, "JPEGSize": {"reward": "JPEGSize", "weight": 0}}))
        'Rewards: 1 OCR + 0 JPEGSize'
    """
    weights = [f"{_weight(term.weight)} {name}" for name, term in terms.items()]
    beside = f"; in validation also {', '.join(metrics)}" if metrics else ""
    return f"Rewards: {' + '.join(weights)}{beside}"


def _weight(weight: object) -> str:
    return f"{weight:g}" if isinstance(weight, int | float) else "scheduled"
