"""One call of a reward's code: what it is given, which values are valid scores, and what happens when it fails.

A reward is foreign code. It gets copies, so that whatever it writes into them changes nothing for others; what it
raises is turned into a RewardError with its name; how long it is waited for is reported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError, RewardError, StoppedError
from lightning_fdfo.reward.base import BaseReward, Metadata, PairReward, Reward
from lightning_fdfo.reward.origin import check_command, describe
from lightning_fdfo.reward.waiting import reported


def check_prompt(name: str, reward: BaseReward, prompt: str, metadata: Metadata) -> None:
    """Raises ConfigurationError if a reward cannot score this prompt."""
    with guarded(name, reward, "cannot check a prompt", "it checks a prompt"):
        reward.check(prompt, own_metadata(metadata))


@torch.no_grad()  # here, because a thread has a grad mode of its own
def score_images(
    name: str,
    reward: BaseReward,
    device: torch.device,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> Tensor:
    """One reward's scores, held to the contract.

    A `PairReward` scores an image by (1 + preference) / 2 over the pair's other one: 1 is won, 1/2 a tie, 0 lost. The
    half difference of two such scores is half of the preference.

    Args:
        name: of the term.
        reward: set up on `device`.
        device: to which the reward's own copy of the images goes.
        images: [N, 3, H, W], on any device; for a `PairReward` rows 2i and 2i+1 are pair i.
        prompts: N strings.
        metadata: N mappings.

    Returns:
        [N], float64, on the CPU: float32 would round 1e8 + 1 and 1e8 + 2 to the same number.

    Raises:
        RewardError: it raised something, or gave something else than N real numbers within float32's range; of a
            `PairReward`, N / 2 in [-1, 1]; NaN for a pair that it has not compared passes.
        ValueError: an odd number of images for a `PairReward`.
    """
    if len(images) % images_per_score(reward):
        raise ValueError(f"reward {name!r} compares two images: expected pairs, got {len(images)} images")
    with _calling(name, reward, device, f"it scores {len(images)} images on {device}"):
        own = images.to(device, copy=True)
        given = torch.as_tensor(_ask(reward, own, list(prompts), [own_metadata(row) for row in metadata])).detach()
        if given.is_complex():
            raise _failure(name, reward, f"expected real numbers, got {_dtype(given)}")
        score = given.cpu().to(torch.float64, copy=True)  # its own: a reward may use its buffer again
    each, what = images_per_score(reward), "preferences" if isinstance(reward, PairReward) else "scores"
    if score.shape != (len(images) // each,):
        raise _failure(name, reward, f"expected [{len(images) // each}] {what}, got shape {list(score.shape)}")
    fine = score.float().isfinite()  # differences train in float32
    if isinstance(reward, PairReward):
        fine = score.isnan() | (score.abs() <= 1)
    if not bool(fine.all()):
        row = int((~fine).nonzero()[0])
        raise _failure(name, reward, f"{what[:-1]} {score[row].item()} for prompt {prompts[each * row]!r}")
    return (1 + torch.stack([score, -score], dim=1).flatten()) / 2 if isinstance(reward, PairReward) else score


def images_per_score(reward: BaseReward) -> int:
    """How many images it takes to ask a reward: two of a `PairReward`, else one."""
    return 2 if isinstance(reward, PairReward) else 1


def _ask(reward: BaseReward, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    if isinstance(reward, PairReward):
        return reward(images[::2].contiguous(), images[1::2].contiguous(), prompts[::2], metadata[::2])
    return cast(Reward, reward)(images, prompts, metadata)


@torch.enable_grad()
def image_gradient(
    name: str,
    reward: BaseReward,
    device: torch.device,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> Tensor:
    """The gradient of each image's score at the image, of a reward that is differentiable.

    Args:
        name: of the term.
        reward: set up on `device`.
        device: to which the reward's own copy of the images goes.
        images: [N, 3, H, W], on any device.
        prompts: N strings.
        metadata: N mappings.

    Returns:
        [N, 3, H, W], float32, on the images' device.

    Raises:
        RewardError: it raised something, its scores carry no gradient, or that is not finite.
    """
    with _calling(name, reward, device, f"it is differentiated at {len(images)} images on {device}"):
        own = images.detach().to(device, torch.float32, copy=True).requires_grad_()
        scores = _ask(reward, own, list(prompts), [own_metadata(row) for row in metadata])
        if not isinstance(scores, Tensor) or not scores.requires_grad:
            raise _failure(name, reward, "expected scores that carry a gradient, for it says `differentiable = True`")
        (gradient,) = torch.autograd.grad(scores.sum(), own)
    if not bool(gradient.isfinite().all()):
        raise _failure(name, reward, f"the gradient of its score is not finite, prompt {prompts[0]!r}")
    return gradient.to(images.device)


def own_metadata(metadata: Metadata) -> Metadata:
    """A copy that shares nothing that can be changed.

    Example:
        >>> given = {"colours": ["red"]}
        >>> own_metadata(given)["colours"].append("blue")
        >>> given
        {'colours': ['red']}
    """
    return copy.deepcopy(dict(metadata))


@contextmanager
def guarded(name: str, reward: BaseReward, failing: str, doing: str) -> Iterator[None]:
    """Around foreign code: reports long waits, and turns whatever it raises into a RewardError with its name.

    KeyboardInterrupt, StoppedError, and what the user can fix, pass.

    Args:
        name: of the term.
        reward: whose code is called.
        failing: what to say of an error.
        doing: what to say of a long wait.
    """
    try:
        with reported(lambda: f"reward {name!r} ({describe(reward)}): {doing}"):
            yield
    except (ConfigurationError, RewardError, KeyboardInterrupt, StoppedError):
        raise
    except ModuleNotFoundError as error:
        raise ConfigurationError(_missing(name, reward, error)) from error
    except BaseException as error:  # SystemExit too: it would end the run without a word
        raise _failure(name, reward, f"{failing}: {error!r}") from error


@contextmanager
def _calling(name: str, reward: BaseReward, device: torch.device, doing: str) -> Iterator[None]:
    """Around the call of a reward on images: guarded, on its device, and in full precision."""
    with (
        guarded(name, reward, f"failed on images on {device}", doing),
        torch.autocast(device.type, enabled=False),  # a score's digits are not the trainer's to cut
        _current(device),
    ):
        yield


def overdue(name: str, reward: BaseReward, num_images: int, seconds: float, reason: str) -> RewardError:
    """The error for a call that took longer than the term's time limit."""
    return _failure(name, reward, f"no scores of {num_images} images within its time_limit of {seconds:g} s ({reason})")


def check_device(name: str, text: str) -> None:
    """Checks that a device is there, without using it where that can be avoided.

    Raises:
        ConfigurationError: no such device on this machine.
    """
    try:
        device = torch.device(text)
        if device.type == "cuda":
            count, index = torch.cuda.device_count(), device.index or 0
            problem = "" if index < count else f"this machine has {count or 'no'} CUDA device{'s' * (count != 1)}"
        else:
            torch.empty(0, device=device)
            problem = ""
    except Exception as error:  # torch raises RuntimeError, AssertionError and others of its own
        problem = str(error).strip().partition("\n")[0]
    if problem:
        raise ConfigurationError(f"reward {name!r}: expected a device like cpu or cuda:0, got {text!r}: {problem}")


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU this thread's current one: each thread begins with the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _failure(name: str, reward: BaseReward, what: str) -> RewardError:
    """Names the reward, its distribution, what happened, and a hint."""
    hint = f"`{check_command(reward)}` shows what a reward must do"
    return RewardError(f"reward {name!r} ({describe(reward)}): {what}; {hint}")


def _missing(name: str, reward: BaseReward, error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0] or str(error)
    return f"reward {name!r} ({describe(reward)}) needs {package}, which is not installed: pip install {package}"
