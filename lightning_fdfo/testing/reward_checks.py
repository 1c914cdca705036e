"""What every reward must do, tried out on four small images.

    from lightning_fdfo.testing import check_reward

    def test_it_is_a_reward():
        check_reward(Redness())

`lightning-fdfo rewards check NAME` runs the same.
"""

from __future__ import annotations

import math
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.base import BaseReward, Metadata, PairReward
from lightning_fdfo.reward.call import own_metadata
from lightning_fdfo.reward.function import FunctionReward, as_reward
from lightning_fdfo.reward.origin import describe
from lightning_fdfo.testing.conformance import Result, examine, insist
from lightning_fdfo.testing.reward_sample import PROMPTS, Sample, make_sample, sample_images

HEAVY = ("diffusers", "lightning", "onnxruntime", "open_clip", "timm", "torchvision", "transformers")
"""What importing a reward's module must not import."""
STEPS = (0.1, 0.03, 0.01, 3e-3, 1e-3)
"""Along a gradient, of a pixel's range: the largest number of it goes so far."""
MAX_PICKLE = 100_000
"""Bytes: a configuration is smaller, weights are larger."""


def check_reward(
    reward: BaseReward | Callable[..., Tensor],
    *,
    prompts: Sequence[str] = PROMPTS,
    metadata: Sequence[Metadata] | None = None,
    device: str = "cpu",
    tolerance: float = 1e-4,
) -> None:
    """Checks that a reward keeps the contract of `lightning_fdfo.Reward`, or of `PairReward`.

    Args:
        reward: an instance, not set up yet, or a plain function.
        prompts: four of them, if the sample's do not suit.
        metadata: four mappings, for a reward that needs some; with prompts of your own, empty ones if not given.
        device: where to try it.
        tolerance: by which a score may depend on its batch: tolerance * (1 + |score|).

    Raises:
        ConformanceError: with a line for each check that failed.
        ValueError: not four prompts or mappings.

    Example:
        >>> check_reward(lambda images, prompts, metadata: images.mean(dim=(1, 2, 3)))
        >>> check_reward(lambda images, prompts, metadata: images.mean())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_fdfo.testing.conformance.ConformanceError: <lambda> of ...:
        - gives one finite number an image, or a pair: expected a tensor of shape [4], got [] of torch.float32...
    """
    results = run_checks(reward, prompts=prompts, metadata=metadata, device=device, tolerance=tolerance)
    insist(describe(as_reward(reward)), results)


def run_checks(
    reward: BaseReward | Callable[..., Tensor],
    *,
    prompts: Sequence[str] = PROMPTS,
    metadata: Sequence[Metadata] | None = None,
    device: str = "cpu",
    tolerance: float = 1e-4,
) -> Iterator[Result]:
    """The checks one by one, as `check_reward` runs them; those after a fatal one are left out."""
    sample = make_sample(as_reward(reward), prompts, metadata, device, tolerance)
    gradients = torch.is_grad_enabled()
    more = PAIR_CHECKS if isinstance(sample.reward, PairReward) else ()
    for result in examine((*CHECKS, *more), sample):
        torch.set_grad_enabled(gradients)  # a reward may have turned them off; one of the checks says so
        yield result


def _stays_out_of_modules(sample: Sample) -> str | None:
    """Keeps its state out of the module tree."""
    holder = nn.Module()
    setattr(holder, "reward", sample.reward)  # noqa: B010 - the attribute is no module, as far as types go
    if isinstance(sample.reward, nn.Module) or list(holder.parameters()) or holder.state_dict():
        return "a reward must not be an nn.Module: hold the model in an attribute instead"
    return None


def _imports_cheaply(sample: Sample) -> str | None:
    """Imports nothing heavy with its module."""
    source = sample.reward.function if isinstance(sample.reward, FunctionReward) else type(sample.reward)
    module = getattr(source, "__module__", "__main__")
    if module == "__main__" or not _importable(module):
        return None  # written in a script or a test: there is no plugin to import
    script = f"import sys, {module}; print(*({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"`import {module}` fails in a fresh process: {done.stderr.strip().splitlines()[-1]}"
    heavy = done.stdout.split()
    return f"`import {module}` imports {', '.join(sorted(heavy))}: import them in setup()" if heavy else None


def _importable(module: str) -> bool:
    """Whether a fresh process finds it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _checks_prompts(sample: Sample) -> str | None:
    """Accepts the sample's prompts and metadata."""
    for prompt, row in zip(sample.prompts, sample.metadata, strict=True):
        try:
            sample.reward.check(prompt, own_metadata(row))
        except ConfigurationError as error:
            return f"{error}; give the check prompts= and metadata= that suit"
    return None


def _sets_up(sample: Sample) -> str | None:
    """Can be set up, and again."""
    sample.reward.fetch()
    sample.reward.setup(sample.device)
    sample.reward.setup(sample.device)
    return None


def _gives_scores(sample: Sample) -> str | None:
    """Gives one finite number an image, or a pair."""
    scores = sample.score()
    if not isinstance(scores, Tensor):
        return f"expected a tensor, got {type(scores).__name__}"
    if scores.shape != (4,) or scores.dtype not in (torch.float32, torch.float64):
        return (
            f"expected a tensor of shape [4], got {list(scores.shape)} of {scores.dtype}; float32 is wanted, or "
            "float64 where scores are so large that float32 would make them equal"
        )
    if scores.device.type not in ("cpu", sample.device.type):
        return f"expected scores on {sample.device} or the CPU, got them on {scores.device}"
    if not bool(scores.isfinite().all()):
        return f"got {scores.tolist()} for a slope, noise, black and white: raise an error, or give a finite score"
    return None


def _stays_in_range(sample: Sample) -> str | None:
    """Stays in its range."""
    low, high = sample.reward.range
    if math.isnan(low) or math.isnan(high) or low >= high:
        return f"expected range = (lowest, highest), got {sample.reward.range}"
    scores = sample.score().cpu()
    nearest = scores.clamp(low, high)
    return None if sample.close(scores, nearest) else f"got {scores.tolist()}, its range says {low} … {high}"


def _turns_with_the_images(sample: Sample) -> str | None:
    """Says the opposite with the images swapped."""
    if sample.reward.differentiable or not sample.reward.higher_is_better:
        return "a PairReward is not differentiable, and higher_is_better: leave both as they are"
    first, second = sample.arguments(sample.images)
    own, turned = (
        sample.ask(
            [each.clone() for each in pair], list(sample.prompts), [own_metadata(row) for row in sample.metadata]
        )
        for pair in ((first, second), (second, first))
    )
    if sample.close(turned.cpu(), -own.cpu()):
        return None
    return f"got {own.tolist()}, with the images swapped {turned.tolist()}: ask both ways, and take (there - back) / 2"


def _leaves_no_gradient(sample: Sample) -> str | None:
    """Leaves no gradient on."""
    with torch.enable_grad():
        scores = sample.score()
        if not torch.is_grad_enabled():
            return "it turned gradients off for everybody: use `with torch.no_grad():`"
    return "freeze the model: requires_grad_(False), or score under torch.no_grad()" if scores.requires_grad else None


def _carries_a_gradient(sample: Sample) -> str | None:
    """Carries a gradient that leads to better scores, where it says that it is differentiable."""
    if not sample.reward.differentiable:
        return None
    images = 0.25 + 0.5 * sample.images[1:2]  # noise, away from black and white, where a clamp has no gradient
    with torch.enable_grad():
        own = images.clone().requires_grad_()
        score = sample.score(slice(1, 2), images=torch.cat([own, own]))
        if not score.requires_grad:
            return "it says differentiable, and its score carries no gradient: score without torch.no_grad()"
        (gradient,) = torch.autograd.grad(score.sum(), own)
    if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
        return f"expected a finite gradient that is not 0 everywhere, its sum of squares is {gradient.square().sum()}"
    way = gradient / gradient.abs().max()
    higher = [sample.score(slice(1, 2), images=torch.cat([images, images + step * way])) for step in STEPS]
    return None if any(bool(one > score) for one in higher) else "no step along its gradient raises its score"


def _is_deterministic(sample: Sample) -> str | None:
    """Gives the same scores again, and draws no global random numbers."""
    before = _global_generators()
    first, second = sample.score(), sample.score()
    if not torch.equal(first, second):
        return f"got {first.tolist()}, then {second.tolist()}"
    if _global_generators() != before:
        return "it drew from a global generator: use one of its own, with a seed"
    return None


def _leaves_its_arguments(sample: Sample) -> str | None:
    """Leaves images, prompts and metadata as they are."""
    expected, prompts = sample.arguments(sample.images), list(sample.prompts)
    images, metadata = [each.clone() for each in expected], [own_metadata(row) for row in sample.metadata]
    sample.ask(images, prompts, metadata)
    same = {
        "images": all(torch.equal(own, given) for own, given in zip(images, expected, strict=True)),
        "prompts": prompts == list(sample.prompts),
        "metadata": metadata == [dict(row) for row in sample.metadata],
    }
    changed = [name for name, kept in same.items() if not kept]
    hint = "work on a copy: a mixture hands it one, other callers may not"
    return f"it changed the {' and '.join(changed)}; {hint}" if changed else None


def _global_generators() -> bytes:
    """The state of torch's, numpy's and Python's, to be compared."""
    return pickle.dumps((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()))


def _does_not_see_the_batch(sample: Sample) -> str | None:
    """Scores a batch as one by one."""
    together = sample.score()
    alone = torch.cat([sample.score(slice(row, row + 1)) for row in range(4)])
    return None if sample.close(alone, together) else f"together {together.tolist()}, alone {alone.tolist()}"


def _takes_other_sizes(sample: Sample) -> str | None:
    """Scores images that are not square."""
    scores = sample.score(images=sample_images(48, 80).to(sample.device))
    if scores.shape != (4,) or not bool(scores.isfinite().all()):
        return f"expected 4 finite scores for images of 48 x 80, got {scores.tolist()}"
    return None


def _pickles_by_configuration(sample: Sample) -> str | None:
    """Pickles by its configuration, without weights."""
    try:
        pickled = pickle.dumps(sample.reward)
    except Exception as error:
        if isinstance(sample.reward, FunctionReward):
            return None  # a lambda or a nested function: it stays in this process
        return f"it cannot be pickled ({error!r}): what setup() makes belongs in attributes that start with _"
    if len(pickled) > MAX_PICKLE:
        return f"{len(pickled)} bytes: what setup() makes belongs in attributes that start with _"
    copy = pickle.loads(pickled)
    copy.setup(sample.device)
    scores = replace(sample, reward=copy).score()
    return None if torch.equal(scores, sample.score()) else "a copy that was set up again gives other scores"


CHECKS: tuple[tuple[Callable[[Sample], str | None], bool], ...] = (
    (_stays_out_of_modules, False),
    (_imports_cheaply, False),
    (_checks_prompts, True),
    (_sets_up, True),
    (_gives_scores, True),
    (_stays_in_range, False),
    (_leaves_no_gradient, False),
    (_carries_a_gradient, False),
    (_is_deterministic, False),
    (_leaves_its_arguments, False),
    (_does_not_see_the_batch, False),
    (_takes_other_sizes, False),
    (_pickles_by_configuration, False),
)
"""Each check, and whether those after it make no sense if it fails."""
PAIR_CHECKS = ((_turns_with_the_images, False),)
"""The same, of a `PairReward` alone."""
