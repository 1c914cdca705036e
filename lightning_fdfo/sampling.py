"""Sampling a flow: Euler's method with churn, one trajectory or two side by side.

    x = (1 - sigma) * x0 + sigma * noise        a state at noise level sigma
    v = dx / dsigma = noise - x0                the velocity that the network gives

Everything here is a pure function: noise comes in, nothing is drawn. Shapes: P pairs, 2P branches (rows 2i and
2i+1 are pair i), T steps, and `...` for a latent's own axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fdfo.schedules import check_sigmas

Velocity = Callable[[Tensor, Tensor], Tensor]
"""`velocity(latents [N, ...], sigma: 0-d tensor) -> [N, ...]`"""

Record = Callable[[int, Tensor, Tensor], None]
"""`record(k, latents [2P, ...], velocity [2P, ...])`, called at each step k = 0 … T-1, both float32 and at sigmas[k]"""


class Trajectories(NamedTuple):
    """What `sample_pairs` saw on its way."""

    latents: Tensor
    """[2P, T+1, ...], float32: the states at sigmas[0] = 1 … sigmas[T] = 0"""
    velocities: Tensor
    """[2P, T, ...], float32: the velocities at the first T of them"""


def churn_prior(latents: Tensor, churn: float | Tensor, noise: Tensor) -> Tensor:
    """Replaces a little of the initial noise by fresh noise; the variance stays 1.

        rho * latents + sqrt(1 - rho^2) * noise        rho = 1 / (1 + churn)

    Args:
        latents: [N, ...], standard normal.
        churn: >= 0; a float or [N].
        noise: [N, ...], standard normal, independent of `latents`.

    Returns:
        [N, ...].

    Example:
        >>> churn_prior(torch.tensor([[1.0]]), 0.25, torch.tensor([[1.0]]))
        tensor([[1.4000]])
    """
    rho = 1 / (1 + _per_row(churn, latents))
    return rho * latents + (1 - rho**2).sqrt() * noise


def churn_step(
    latents: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    churn: float | Tensor,
    noise: Tensor,
) -> Tensor:
    """One step of Euler's method from sigma to sigma_next, with a little of the noise replaced by fresh noise.

    Args:
        latents: x, [N, ...].
        velocity: v at x and sigma, [N, ...].
        sigma: in (0, 1]; a float or [N].
        sigma_next: in [0, sigma); a float or [N].
        churn: >= 0; a float or [N].
        noise: [N, ...], standard normal and fresh.

    Returns:
        x_next, [N, ...].

    Example:
        >>> x, v = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> churn_step(x, v, 1.0, 0.5, 0.0, torch.tensor([[9.0]]))
        tensor([[0.]])
        >>> churn_step(x, v, 1.0, 0.5, 0.25, torch.tensor([[1.0]]))
        tensor([[0.2000]])

    A velocity points to an image, and from a noise. The step keeps the image, and mixes the noise:

        x0     = x - sigma * v
        kept   = rho * (x + (1 - sigma) * v)            rho = 1 / (1 + churn)
        fresh  = sqrt(1 - rho^2) * noise
        x_next = (1 - sigma_next) * x0 + sigma_next * (kept + fresh)
               = x + (sigma_next - sigma) * v + sigma_next * (fresh - (1 - rho) * (x + (1 - sigma) * v))

    The last line is the one computed: with churn = 0 it is Euler's method to the last bit. At sigma_next = 0 churn has
    no effect.

    Source: arXiv 2603.12893; equal to the stochastic step of Karras et al. 2022 (arXiv 2206.00364, algorithm 2),
    written for a straight path.
    """
    sigma, sigma_next = _per_row(sigma, latents), _per_row(sigma_next, latents)
    rho = 1 / (1 + _per_row(churn, latents))
    noise_fresh = (1 - rho**2).sqrt() * noise
    noise_lost = (1 - rho) * (latents + (1 - sigma) * velocity)
    return latents + (sigma_next - sigma) * velocity + sigma_next * (noise_fresh - noise_lost)


def sample(velocity_fn: Velocity, latents: Tensor, sigmas: Tensor) -> Tensor:
    """Euler's method from noise to image, without churn.

    Args:
        velocity_fn: `velocity_fn(latents [N, ...], sigma: 0-d tensor) -> [N, ...]`.
        latents: [N, ...], standard normal.
        sigmas: [T+1], from 1 to 0.

    Returns:
        The latents at sigma = 0, [N, ...], float32.

    Raises:
        ValueError: sigmas does not fall strictly from 1 to 0.

    Example:
        >>> sample(lambda x, sigma: x, torch.ones(1, 1), torch.tensor([1.0, 0.5, 0.0]))
        tensor([[0.2500]])
    """
    check_sigmas(sigmas)
    latents = latents.float()
    for sigma, sigma_next in itertools.pairwise(sigmas):
        latents = latents + (sigma_next - sigma) * velocity_fn(latents, sigma).float()
    return latents


def stream_pairs(
    velocity_fn: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    churn: float | Tensor,
    noise: Callable[[int], Tensor],
    record: Record,
) -> Tensor:
    """Samples two branches of each pair from the same initial latents; each branch has fresh noise of its own.

    Nothing is kept of the way but what `record` keeps.

    Args:
        velocity_fn: `velocity_fn(latents [2P, ...], sigma: 0-d tensor) -> [2P, ...]`.
        latents: [P, ...], standard normal, shared by the branches of a pair.
        sigmas: [T+1], from 1 to 0.
        churn: a float for all, or [T+1]: index 0 for the initial latents, index k for the step to sigmas[k].
        noise: `noise(k) -> [2P, ...]`, standard normal; k = 0 for the initial latents, k for the step to sigmas[k].
            Not called for the last step, which has no noise.
        record: sees the state and the velocity of each step.

    Returns:
        The latents at sigma = 0, [2P, ...], float32; rows 2i and 2i+1 are pair i.

    Raises:
        ValueError: sigmas does not fall strictly from 1 to 0, or churn has another length.

    Example:
        >>> stream_pairs(
        ...     lambda x, sigma: x, torch.ones(1, 1), torch.tensor([1.0, 0.5, 0.0]), 0.0, lambda k: torch.zeros(2, 1),
        ...     record=lambda k, latents, velocity: print(k, latents.tolist()),
        ... )
        0 [[1.0], [1.0]]
        1 [[0.5], [0.5]]
        tensor([[0.2500],
                [0.2500]])

    Source: arXiv 2603.12893.
    """
    check_sigmas(sigmas)
    churns = torch.as_tensor(churn, dtype=torch.float32)
    if churns.ndim and churns.shape != sigmas.shape:
        raise ValueError(f"expected churn to be a float or [{len(sigmas)}], got shape {list(churns.shape)}")
    churns = churns.expand(len(sigmas))
    state = churn_prior(latents.float().repeat_interleave(2, dim=0), churns[0], noise(0))
    num_steps = len(sigmas) - 1
    for k, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        velocity = velocity_fn(state, sigma).float()
        record(k, state, velocity)
        fresh = noise(k + 1) if k + 1 < num_steps else torch.zeros_like(state)
        state = churn_step(state, velocity, sigma, sigma_next, churns[k + 1], fresh)
    return state


def sample_pairs(
    velocity_fn: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    churn: float | Tensor,
    noise: Callable[[int], Tensor],
) -> Trajectories:
    """The same, and keeps all states and velocities: see `stream_pairs`.

    Returns:
        Trajectories; rows 2i and 2i+1 are pair i.

    Example:
        >>> flow = lambda x, sigma: x
        >>> same = sample_pairs(flow, torch.ones(1, 1), torch.tensor([1.0, 0.5, 0.0]), 0.0, lambda k: torch.zeros(2, 1))
        >>> same.latents[..., 0]
        tensor([[1.0000, 0.5000, 0.2500],
                [1.0000, 0.5000, 0.2500]])
    """
    states: list[Tensor] = []
    velocities: list[Tensor] = []

    def record(_: int, state: Tensor, velocity: Tensor) -> None:
        states.append(state)
        velocities.append(velocity)

    end = stream_pairs(velocity_fn, latents, sigmas, churn, noise, record)
    return Trajectories(torch.stack([*states, end], dim=1), torch.stack(velocities, dim=1))


def _per_row(value: float | Tensor, like: Tensor) -> Tensor:
    """A scalar or [N], shaped to multiply [N, ...] row by row."""
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return tensor.reshape(-1, *[1] * (like.ndim - 1))
