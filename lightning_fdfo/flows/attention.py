"""`flow.attention`: the back-end that computes a transformer's attention, by diffusers' names."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_fdfo.errors import ConfigurationError

BACKENDS = tuple(
    backend.value
    for backend in AttentionBackendName
    if "sage" not in backend.value and not backend.value.endswith("_hub")
)
"""Diffusers' names, without SageAttention's kernels, which have no gradient, and without those whose code is fetched
from the hub and run."""
ON_CPU = ("native", "flex", "_native_flash", "_native_math")
"""Those that do not need an accelerator."""
KERNELS = {
    "native": None,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""Those that are kernels of PyTorch's `scaled_dot_product_attention`; None lets PyTorch choose."""


class KernelProcessor:
    """An attention processor of diffusers', with one kernel of PyTorch's `scaled_dot_product_attention`.

    For processors that call that function themselves, and take no back-end: those of Stable Diffusion 3 and SANA.

    Args:
        processor: diffusers' own.
        kernel: PyTorch's.
    """

    def __init__(self, processor: Any, kernel: SDPBackend) -> None:
        self.processor = processor
        self.kernel = kernel

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the processor gives."""
        with sdpa_kernel(self.kernel):  # here, not around the model: a checkpointed block runs again in the backward
            return self.processor(*args, **options)


def check_attention(name: str | None) -> None:
    """Checks, before a model is loaded, that a back-end is one, and can run here as far as that is known.

    Args:
        name: `flow.attention`; None leaves diffusers' default.

    Raises:
        ConfigurationError: diffusers has no such back-end, a package is missing, or it needs a CUDA device.

    Example:
        >>> check_attention("math")
        Traceback (most recent call last):
        lightning_fdfo.errors.ConfigurationError: flow.attention: expected one of flash, ..., got 'math'
    """
    if name is None:
        return
    if name not in BACKENDS:
        raise ConfigurationError(f"flow.attention: expected one of {', '.join(BACKENDS)}, got {name!r}")
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except RuntimeError as error:
        raise ConfigurationError(f"flow.attention: {error}") from error
    if name not in ON_CPU and not torch.cuda.is_available():
        raise ConfigurationError(
            f"flow.attention: {name} needs a CUDA device, and there is none here; expected one of {', '.join(ON_CPU)}"
        )


def check_takes(transformer: nn.Module, name: str | None) -> None:
    """Checks that a transformer's attention can have a back-end; it may be on the meta device.

    Raises:
        ConfigurationError: its processors call PyTorch's attention, and the back-end is not one of PyTorch's.
    """
    fixed = [processor for _, processor in _processors(transformer) if not hasattr(processor, "_attention_backend")]
    if name is not None and fixed and name not in KERNELS:
        raise ConfigurationError(
            f"flow.attention: {type(fixed[0]).__name__} of diffusers computes attention by PyTorch alone: expected one "
            f"of {', '.join(KERNELS)}, got {name}"
        )


def set_attention(transformer: Any, name: str | None) -> None:
    """Gives each attention of a loaded diffusers transformer its back-end, and no other model of the process.

    Args:
        transformer: loaded.
        name: `flow.attention`; None leaves diffusers' default.

    Raises:
        ConfigurationError: see `check_takes`.
    """
    check_takes(transformer, name)
    if name is None:
        return
    default, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        transformer.set_attention_backend(name)
    finally:
        _AttentionBackendRegistry.set_active_backend(default)  # diffusers makes it that of all models
    kernel = KERNELS.get(name)
    for attention, processor in _processors(transformer):
        if kernel is not None and not hasattr(processor, "_attention_backend"):
            attention.set_processor(KernelProcessor(processor, kernel))


def _processors(transformer: nn.Module) -> list[tuple[Any, Any]]:
    """Each attention of a transformer, with its processor."""
    modules: list[Any] = [module for module in transformer.modules() if hasattr(module, "processor")]
    return [(module, module.processor) for module in modules]
