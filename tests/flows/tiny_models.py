"""Tiny random models, whose numbers depend on all that they are given, and what is tried with their pipelines."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.testing.flow_subject import NEGATIVES, PROMPTS, Subject

Module = TypeVar("Module", bound=nn.Module)


def random_weights(module: Module, seed: int = 0, gain: float = 1.0) -> Module:
    """Matrices of deviation gain / sqrt(inputs), and vectors near 0 or 1, whichever they were: as they come from
    constructors, transformers hardly see their inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.copy_(parameter.mean().round() + 0.1 * noise)
            else:
                parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
    return module


def subject(flow: DiffusersFlow, size: tuple[int, int]) -> Subject:
    """A flow that is loaded and tried at one size."""
    flow.load()
    return Subject(flow, [size], num_steps=3, guidance_scale=3.0, device=torch.device("cpu"), tolerance=1e-4)


@torch.no_grad()
def effects(flow: DiffusersFlow, size: tuple[int, int]) -> dict[str, float]:
    """By how much of its size the velocity changes with each input; below 0.01, a check does not check it."""
    flow.load()
    latents = torch.randn(2, *flow.latent_shape(*size), generator=torch.Generator().manual_seed(0))
    texts = flow.encode(PROMPTS[:2], NEGATIVES[:2])

    def velocity(latents: Tensor = latents, sigma: float = 0.5, rows: tuple[int, int] = (0, 1), scale: float = 1.0):
        return flow.velocity(latents, torch.tensor(sigma), texts[rows], scale)

    usual, token = velocity(), flow.patch_size
    others = {
        "sigma": velocity(sigma=0.6),
        "text": velocity(rows=(1, 0)),
        "guidance": velocity(scale=3.0),
        "row": velocity(latents.roll(token, 2)).roll(-token, 2),
        "column": velocity(latents.roll(token, 3)).roll(-token, 3),
    }
    return {name: ((other - usual).norm() / usual.norm()).item() for name, other in others.items()}


def check_outline(flow: DiffusersFlow, size: tuple[int, int]) -> None:
    """What a flow says before it is loaded is what it says after; weights that lack a tensor are told by its name."""
    outline = flow.outline()
    shapes = {name: parameter.shape for name, parameter in outline.named_parameters()}
    said = (flow.latent_shape(*size), flow.guidance, flow.size_multiple, flow.sigmas(3, *size).tolist())
    with pytest.raises(ConfigurationError, match=f"must be multiples of {flow.size_multiple}, .* nearest: "):
        flow.latent_shape(size[0] + 1, size[1])
    if flow.max_tokens_a_side is not None:
        with pytest.raises(ConfigurationError, match=r"has positions for \d+ tokens a side"):
            flow.latent_shape(size[0], flow.size_multiple * (flow.max_tokens_a_side + 1))
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert not hasattr(flow, "transformer")
    flow.load()
    assert {name: parameter.shape for name, parameter in flow.transformer.named_parameters()} == shapes
    assert (flow.latent_shape(*size), flow.guidance, flow.size_multiple, flow.sigmas(3, *size).tolist()) == said


def check_missing_tensor(adapter: Callable[..., DiffusersFlow], folder: Path, copy: Path) -> None:
    """A tensor that the transformer's weights lack is told by its name."""
    shutil.copytree(folder, copy)
    (file,) = (copy / "transformer").glob("*.safetensors")
    state = load_file(file)
    name = min(state)
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=rf"transformer: its weights lack a tensor: {re.escape(name)};"):
        adapter(str(copy)).load()


def check_cached_texts(
    adapter: Callable[..., DiffusersFlow], folder: Path, size: tuple[int, int], cache: Path, monkeypatch: Any
) -> None:
    """Texts from the cache give the images of encoders that stay, and encoders are loaded once for all."""
    expected = subject(adapter(str(folder), text_encoders="keep"), size)
    guidance_scale = expected.guidance_scales[-1]
    images = expected.our_images(size, guidance_scale)
    loaded: list[dict[str, Any]] = []
    load_pipeline = DiffusersFlow.load_pipeline

    def load(flow: DiffusersFlow, **parts: Any) -> Any:
        pipeline = load_pipeline(flow, **parts)
        loaded.append({name: module for name, module in pipeline.components.items() if module is not None})
        return pipeline

    monkeypatch.setattr(DiffusersFlow, "load_pipeline", load)
    for with_encoders in (1, 0):
        loaded.clear()
        flow = adapter(str(folder), text_encoders="cache", text_cache=str(cache))
        cached = subject(flow, size)
        flow.prepare_texts(PROMPTS, expected.negatives(guidance_scale) or [], torch.device("cpu"))
        assert torch.equal(cached.our_images(size, guidance_scale), images)
        assert flow.text_modules == []
        assert sum("text_encoder" in parts for parts in loaded) == with_encoders
