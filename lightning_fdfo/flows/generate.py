"""Generating: encode prompts, sample latents without churn, decode images.

Lightning validates in inference mode. It is off here: what a model caches meanwhile must do for training too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.watched_velocity import WatchedVelocity
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.randomness import Stream, generator, stack_normal
from lightning_fdfo.sampling import sample
from lightning_fdfo.settings import Sampling


@torch.inference_mode(False)
@torch.no_grad()
def generate(
    flow: FlowModel,
    prompts: Sequence[Prompt],
    indices: Sequence[int],
    *,
    seed: int,
    sampling: Sampling,
    device: torch.device,
    repeats: Sequence[int] | None = None,
    conditioning: Conditioning | None = None,
) -> Tensor:
    """Images for prompts from fixed latents, without churn: [N, 3, H, W] in [0, 1].

    Args:
        flow: the model, loaded.
        prompts: N prompts.
        indices: N numbers; image i's latents are a function of (seed, indices[i], repeats[i]).
        seed: the run's.
        sampling: settings; churn is not used.
        device: where the model is.
        repeats: N numbers that tell the images of one prompt apart; None for the first of each.
        conditioning: of the prompts, if they are encoded already; N rows on any device.

    Raises:
        DivergenceError: latents or images are not finite; it names prompt and step.
    """
    repeats = [0] * len(indices) if repeats is None else repeats
    generators = [
        generator(Stream.VALIDATION, seed, repeat, index) for index, repeat in zip(indices, repeats, strict=True)
    ]
    latents = stack_normal(generators, *flow.latent_shape(sampling.height, sampling.width)).to(device)
    if conditioning is None:
        conditioning = encode_prompts(flow, prompts, sampling.guidance_scale, len(prompts))
    conditioning = conditioning.to(device)
    sigmas = flow.sigmas(sampling.num_steps, sampling.height, sampling.width)
    velocity = WatchedVelocity(lambda x, sigma: flow.velocity(x, sigma, conditioning, sampling.guidance_scale))
    end = sample(velocity, latents, sigmas)
    images = flow.decode(end)
    velocity.check(end, images, [f"prompt {prompt.text!r} ({prompt.source})" for prompt in prompts], conditioning)
    return images


@torch.inference_mode(False)
@torch.no_grad()
def encode_prompts(flow: FlowModel, prompts: Sequence[Prompt], guidance_scale: float, batch_size: int) -> Conditioning:
    """Conditioning for prompts, a row each; texts that come several times are encoded once.

    Negative prompts are encoded only if guidance uses them.

    Args:
        flow: the model, loaded; its text encoders are on the device while this runs, and need not be otherwise.
        prompts: N prompts.
        guidance_scale: 1 uses no negative prompts.
        batch_size: texts that are encoded at once.
    """
    with_negatives = flow.uses_negatives(guidance_scale)
    texts = [(prompt.text, prompt.negative if with_negatives else "") for prompt in prompts]
    different = list(dict.fromkeys(texts))
    rows = {text: row for row, text in enumerate(different)}
    parts = []
    with flow.encoding():
        for start in range(0, len(different), batch_size):
            chunk, negatives = map(list, zip(*different[start : start + batch_size], strict=True))
            parts.append(flow.encode(chunk, negatives if with_negatives else None))
    encoded = Conditioning.cat(parts)
    return encoded if len(different) == len(texts) else encoded[[rows[text] for text in texts]]
