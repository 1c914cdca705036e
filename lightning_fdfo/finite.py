"""Finds tensors with numbers that are not finite, and names them.

A tensor is read once, by its extremes. A sampler's velocities: `flows/watched_velocity.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_fdfo.errors import ConfigurationError, DivergenceError

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


def check_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Raises DivergenceError, with a tensor's name, if weights that train are not finite."""
    wrong = first_not_finite(weights)
    if wrong is not None:
        raise DivergenceError(
            f"the trained weights are not finite: {wrong}; nothing is written. Resume from an earlier checkpoint, or "
            "start from scratch, with a smaller learning rate"
        )


def _local(tensor: Tensor) -> Tensor:
    """This process's part, without its history."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def check_finite_checkpoint(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises ConfigurationError, with the tensor's name, if something of a checkpoint's is not finite.

    Args:
        tensors: by name.
        what: to call them.

    Example:
        >>> check_finite_checkpoint({"B": torch.zeros(8, 4)}, "weights")
    """
    wrong = first_not_finite(tensors)
    if wrong is not None:
        raise ConfigurationError(
            f"the checkpoint's {what} cannot be used: {wrong}: its run had diverged; resume from an earlier one by "
            "--ckpt_path FILE"
        )
