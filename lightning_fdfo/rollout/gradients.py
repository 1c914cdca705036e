"""Exact gradients of rewards at the final latents, for the mixture's terms that ask for them.

    images, with gradient --reward--> d score / d image --decoder, backward--> d score / d latents

One graph is in memory at a time, of one pair: the reward's, then the decoder's.

Legend: P pairs on this device, 2P branches, `...` a latent's own axes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_fdfo.errors import RewardError
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.routing import Route
from lightning_fdfo.reward.scores import Scores


def reward_gradients(
    flow: FlowModel,
    rewards: RewardMix,
    ends: Tensor,
    images: Tensor,
    prompts: Sequence[Prompt],
    routes: Mapping[str, Route],
    *,
    epoch: int,
    drop: bool = False,
) -> dict[str, Tensor]:
    """Gradients of the rewards whose terms train by them in an epoch, in the rewards' own units.

    Args:
        flow: the model, whose `decode` is differentiated.
        rewards: the mixture, set up.
        ends: [2P, ...], final latents.
        images: [2P, 3, H, W], decoded from them.
        prompts: 2P.
        routes: name -> which of the images it scores.
        epoch: the current one.
        drop: whether a gradient that cannot be had is left out, with a warning.

    Returns:
        Name -> [2P, ...], float32, on the CPU; 0 for an image that the term is not for, NaN for one left out.

    Raises:
        RewardError: a reward failed, or a gradient is not finite; it names the prompt, and has the image's row.
    """
    names = rewards.gradient_terms(epoch)
    found = {name: torch.zeros(ends.shape, dtype=torch.float32) for name in names}
    for start in range(0, len(ends) if names else 0, 2):
        pair = slice(start, start + 2)
        pulls = {}
        for name in names:
            if bool(routes[name].routed[pair].all()):  # a route is the prompt's, and so the same for both
                try:
                    pulls[name] = rewards.image_gradient(name, images[pair], prompts[pair])
                except RewardError as error:
                    error.row = start
                    found[name][pair] = _left_out(error, drop)
        gradients = _through_decoder(flow, ends[pair], list(pulls.values())) if pulls else []
        for name, gradient in zip(pulls, gradients, strict=True):
            if not bool(gradient.isfinite().all()):
                infinite = RewardError(f"the gradient of reward {name!r} is not finite, prompt {prompts[start].text!r}")
                infinite.row = start
                gradient = _left_out(infinite, drop).expand_as(gradient)
            found[name][pair] = gradient.float().cpu()
    return found


def without_failures(scores: Mapping[str, Scores], gradients: Mapping[str, Tensor]) -> dict[str, Scores]:
    """The scores, without those of images whose gradient was left out: their pairs are dropped."""
    kept = dict(scores)
    for name, gradient in gradients.items():
        failed = gradient.flatten(1).isnan().any(dim=1)
        kept[name] = scores[name]._replace(scored=scores[name].scored & ~failed)
    return kept


@torch.enable_grad()
def _through_decoder(flow: FlowModel, ends: Tensor, pulls: Sequence[Tensor]) -> list[Tensor]:
    """Gradients at the latents of gradients at the images; of each the largest number is 1 within the decoder.

    A gradient at a pixel may be smaller than float16's numbers, in which the decoder may compute.
    """
    latents = ends.detach().clone().requires_grad_()
    images = flow.decode(latents)
    sizes = [pull.abs().max().clamp(min=torch.finfo(torch.float32).tiny) for pull in pulls]
    units = [(pull / size).to(images) for pull, size in zip(pulls, sizes, strict=True)]
    found = [torch.autograd.grad(images, latents, unit, retain_graph=True)[0] for unit in units]
    return [size * each.float() for size, each in zip(sizes, found, strict=True)]


def _left_out(error: RewardError, drop: bool) -> Tensor:
    """NaN, after a warning; raises the error where nothing may be left out."""
    if not drop:
        raise error
    warnings.warn(f"dropped, with its pair: {error}", stacklevel=2)
    return torch.tensor(torch.nan)
