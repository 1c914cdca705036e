"""A velocity that is checked at each sampling step: the first step whose values are not finite is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fdfo.errors import DivergenceError
from lightning_fdfo.sampling import Velocity

if TYPE_CHECKING:
    from lightning_fdfo.flows.conditioning import Conditioning


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
