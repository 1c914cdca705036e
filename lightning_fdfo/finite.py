"""Numbers that are not finite: found where they are made, and named.

Weights are read once, by their extremes; of a sampler's velocities each step notes which rows are finite, and nobody
waits for the device before the images are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_fdfo.errors import DivergenceError
from lightning_fdfo.sampling import Velocity

if TYPE_CHECKING:
    from lightning_fdfo.flow import Conditioning

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Those that can hold a number that is not finite and have extremes; quantised weights have neither."""


def finite_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Which tensors hold finite numbers only; of sharded ones this process's part is read.

    Args:
        tensors: K of them, on any devices.

    Returns:
        bool [K], on the CPU.

    Example:
        >>> finite_tensors([torch.ones(2), torch.tensor([0.0, torch.nan]), torch.tensor([1, 2])])
        tensor([ True, False,  True])
    """
    finite = torch.ones(len(tensors), dtype=torch.bool)
    extremes: dict[torch.device, dict[int, Tensor]] = {}
    for place, tensor in enumerate(tensors):
        local = _local(tensor)
        plain = type(local) in (Tensor, torch.nn.Parameter) and not local.is_meta
        if plain and local.dtype in DTYPES and local.numel():
            extreme = torch.stack(torch.aminmax(local)).isfinite().all()  # NaN is both the least and the greatest
            extremes.setdefault(local.device, {})[place] = extreme
    for found in extremes.values():  # one wait a device
        finite[list(found)] = torch.stack(list(found.values())).cpu()
    return finite


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that holds a number that is not finite, and how many; None if all are finite.

    Example:
        >>> first_not_finite({"A": torch.ones(2), "B": torch.tensor([[1.0, torch.nan]])})
        'B (1 of its 2 numbers is not finite)'
    """
    finite = finite_tensors(list(tensors.values()))
    if finite.all():
        return None
    name = list(tensors)[int(finite.int().argmin())]
    values = _local(tensors[name])
    count = int((~values.isfinite()).sum())
    return f"{name} ({count} of its {values.numel()} numbers {'are' if count > 1 else 'is'} not finite)"


def check_trained(weights: Mapping[str, Tensor]) -> None:
    """Raises DivergenceError, with a tensor's name, if weights that train are not finite."""
    wrong = first_not_finite(weights)
    if wrong is not None:
        raise DivergenceError(
            f"the trained weights are not finite: {wrong}; nothing is written. Go on from an earlier checkpoint, or "
            "anew, with a smaller learning rate"
        )


class WatchedVelocity:
    """A velocity that notes at each step which rows are finite, on the device, without waiting for it.

    Args:
        velocity: `velocity(latents [N, ...], sigma: 0-d tensor) -> [N, ...]`.

    Example:
        >>> watched = WatchedVelocity(lambda latents, sigma: latents / sigma)
        >>> velocity = watched(torch.tensor([[1.0], [torch.inf]]), torch.tensor(0.5))
        >>> watched.check(torch.zeros(2, 1), torch.zeros(2, 3, 1, 1), ["prompt 'a'", "prompt 'b'"])
        Traceback (most recent call last):
        ...
        lightning_fdfo.errors.DivergenceError: prompt 'b': the velocity is not finite from step 1 of 1 (sigma 0.5) on; \
1 of 2 images of this batch are spoilt. A learning rate or guidance_scale that is too high, or numbers beyond the \
range of the model's dtype, lead here
    """

    def __init__(self, velocity: Velocity) -> None:
        self._velocity = velocity
        self._sigmas: list[Tensor] = []
        self._finite: list[Tensor] = []

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """The velocity; notes which rows of it are finite."""
        velocity = self._velocity(latents, sigma)
        self._sigmas.append(sigma)
        self._finite.append(_finite_rows(velocity))
        return velocity

    def check(
        self, ends: Tensor, images: Tensor, names: Sequence[str], conditioning: Conditioning | None = None
    ) -> None:
        """Looks at all that was sampled and decoded; waits for the device once.

        Args:
            ends: the final latents, [N, ...].
            images: decoded from them, [N, 3, H, W].
            names: what to call the rows.
            conditioning: N rows, to tell whether they are the reason.

        Raises:
            DivergenceError: something is not finite; it names row, step and sigma.
        """
        finite = torch.stack([*self._finite, _finite_rows(ends), _finite_rows(images)]).cpu()  # [T+2, N]
        if finite.all():
            return
        stage, row = (~finite).nonzero()[0].tolist()
        num_steps, spoilt = len(self._finite), int((~finite).any(dim=0).sum())
        if stage < num_steps:
            what = f"the velocity is not finite from step {stage + 1} of {num_steps} "
            what += f"(sigma {self._sigmas[stage].item():.4g}) on"
        else:
            what = f"the {'latents' if stage == num_steps else 'decoded image'} after {num_steps} steps are not finite"
        for name, tensor in conditioning.tensors.items() if conditioning is not None and stage == 0 else ():
            if tensor.is_floating_point() and not tensor[row].isfinite().all():
                what = f"its encoded text ({name}) is not finite"
        raise DivergenceError(
            f"{names[row]}: {what}; {spoilt} of {len(names)} images of this batch are spoilt. A learning rate or "
            "guidance_scale that is too high, or numbers beyond the range of the model's dtype, lead here"
        )


def _finite_rows(values: Tensor) -> Tensor:
    """[N, ...] -> bool [N]."""
    return values.flatten(1).isfinite().all(dim=1)


def _local(tensor: Tensor) -> Tensor:
    """This process's part, without its history."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
