"""What every model family must do, tried out against the pipeline that it serves.

In your tests:

    from lightning_fdfo.testing import check_flow_model

    def test_it_is_a_flow_model(tmp_path):
        check_flow_model(MyFlow(str(tiny_random_pipeline(tmp_path))))
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.diffusers_flow import DiffusersFlow
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_contents import settings_in
from lightning_fdfo.flows.lora_files import LORA_FILE, add_lora, read_settings, save_lora
from lightning_fdfo.testing.conformance import Check, Result, examine, insist
from lightning_fdfo.testing.flow_subject import PROMPTS, Subject


def check_flow_model(
    flow: DiffusersFlow,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    num_steps: int = 4,
    guidance_scale: float = 3.0,
    device: str = "cpu",
    tolerance: float = 1e-4,
) -> None:
    """Checks that a model family does with its model what the model's own pipeline does.

    Loads the model twice, adds a LoRA with random weights to it, and leaves it so.

    Args:
        flow: of the family, not loaded yet; float32 for the tolerance to make sense.
        sizes: heights and widths in pixels; None takes a small square and a small oblong.
        num_steps: of the sampler.
        guidance_scale: tried beside 1, if the model has guidance.
        device: where to try it.
        tolerance: of a pixel in [0, 1]; of a velocity, relative to its mean size.

    Raises:
        ConformanceError: with a line for each check that failed.

    Example:
        >>> from lightning_fdfo.flows import StableDiffusion3
        >>> check_flow_model(StableDiffusion3("tiny-digits", max_sequence_length=0), num_steps=2)
    """
    results = run_flow_checks(
        flow, sizes=sizes, num_steps=num_steps, guidance_scale=guidance_scale, device=device, tolerance=tolerance
    )
    insist(type(flow).__name__, results)


def run_flow_checks(
    flow: DiffusersFlow,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    num_steps: int = 4,
    guidance_scale: float = 3.0,
    device: str = "cpu",
    tolerance: float = 1e-4,
) -> Iterator[Result]:
    """The checks one by one, as `check_flow_model` runs them; those after a fatal one are left out."""
    with torch.random.fork_rng(devices=[]):
        yield from examine(CHECKS, Subject(flow, sizes, num_steps, guidance_scale, torch.device(device), tolerance))


def _loads(subject: Subject) -> str | None:
    """Loads, again and again, and registers the transformer alone, frozen."""
    subject.flow.load()
    subject.flow.load()
    subject.flow.to_device(subject.device)
    subject.flow.transformer.to(subject.device)
    subject.plain = subject.flow.load_pipeline().to(subject.device)
    registered = {name.split(".")[0] for name, _ in subject.flow.named_parameters()}
    if registered != {"transformer"}:
        return f"it registers {sorted(registered)}, expected the transformer: keep the rest in a plain holder"
    trains = [name for name, parameter in subject.flow.named_parameters() if parameter.requires_grad]
    return f"{len(trains)} weights train, {trains[0]} among them" if trains else None


def _generates_the_same(subject: Subject) -> str | None:
    """Generates, without churn, the images of the pipeline's own call from the same latents."""
    for size in subject.sizes:
        for guidance_scale in subject.guidance_scales:
            ours, theirs = subject.our_images(size, guidance_scale), subject.their_images(size, guidance_scale)
            if ours.shape != theirs.shape:
                return f"expected images of {list(theirs.shape)}, got {list(ours.shape)}"
            if (largest := subject.far(ours, theirs)) is not None:
                return f"pixels differ by up to {largest:.2e} at {size[0]} x {size[1]}, guidance {guidance_scale}"
    return None


def _has_the_same_grid(subject: Subject) -> str | None:
    """Has the pipeline's grid of sigmas, from 1 to 0."""
    for size in subject.sizes:
        sigmas = subject.flow.sigmas(subject.num_steps, *size)
        if sigmas.shape != (subject.num_steps + 1,) or sigmas.dtype != torch.float32:
            return f"expected float32 [{subject.num_steps + 1}], got {sigmas.dtype} {list(sigmas.shape)}"
        if sigmas[0] != 1 or sigmas[-1] != 0 or not bool((sigmas.diff() < 0).all()):
            return f"expected it to fall from 1 to 0, got {sigmas.tolist()}"
        subject.their_images(size, 1.0)
        theirs = torch.as_tensor(subject.plain.scheduler.sigmas, dtype=torch.float32).cpu()
        if not torch.allclose(sigmas, theirs, rtol=0, atol=1e-6):
            return f"got {sigmas.tolist()} at {size[0]} x {size[1]}, the pipeline has {theirs.tolist()}"
    return None


def _conditioning_is_a_batch(subject: Subject) -> str | None:
    """Encodes to conditioning whose rows can be taken, joined and moved."""
    together = subject.encode()
    if {len(tensor) for tensor in together.tensors.values()} != {len(PROMPTS)}:
        shapes = {name: list(tensor.shape) for name, tensor in together.tensors.items()}
        return f"expected {len(PROMPTS)} rows in each tensor, got {shapes}"
    order = [2, 0, 1]
    joined = Conditioning.cat([together[[row]] for row in order]).to(subject.device)
    latents, sigma = subject.latents(subject.sizes[-1]), torch.tensor(0.5, device=subject.device)
    with torch.no_grad():
        expected = subject.flow.velocity(latents, sigma, together)
        again = subject.flow.velocity(latents[order], sigma, joined)
        with subject.flow.encoding():
            alone = Conditioning.cat([subject.flow.encode([prompt]) for prompt in PROMPTS])
        encoded_alone = subject.flow.velocity(latents, sigma, alone)
    scale = expected.abs().mean().item()
    if (largest := subject.far(again, expected[order], scale)) is not None:
        return f"rows taken and joined again give velocities that differ by {largest:.2e}"
    if (largest := subject.far(encoded_alone, expected, scale)) is not None:
        return f"prompts encoded one by one give velocities that differ by {largest:.2e}: is there a mask for padding?"
    return None


def _does_not_see_the_batch(subject: Subject) -> str | None:
    """Gives in a batch the velocities that it gives one by one."""
    with torch.no_grad():
        together = subject.velocity()
        alone = torch.cat([subject.velocity([row]) for row in range(len(PROMPTS))])
    largest = subject.far(alone, together, together.abs().mean().item())
    return None if largest is None else f"they differ by {largest:.2e}"


def _decodes_images(subject: Subject) -> str | None:
    """Decodes to finite float32 images in [0, 1]."""
    for size in subject.sizes:
        with torch.no_grad():
            images = subject.flow.decode(20 * subject.latents(size))
        if images.shape != (len(PROMPTS), 3, *size) or images.dtype != torch.float32:
            return (
                f"expected float32 [{len(PROMPTS)}, 3, {size[0]}, {size[1]}], got {images.dtype} {list(images.shape)}"
            )
        if not bool(images.isfinite().all()) or images.min() < 0 or images.max() > 1:
            return f"got values from {images.min().item():.3g} to {images.max().item():.3g}: clamp them"
    return None


def _lora_binds(subject: Subject) -> str | None:
    """Takes a LoRA that starts from the base model, changes the velocity, and leaves the base model as it was.

    Each of its weights must have a gradient, be it 0: DDP waits for those that have none.
    """
    before = subject.velocity()
    bound = add_lora(subject.flow, LoRA(rank=2, alpha=6), seed=0)
    transformer: Any = subject.flow.transformer
    if not bound:
        return "it binds no layer: check lora_targets"
    if not torch.equal(subject.velocity(), before):
        return "the velocity changes before anything was trained"
    randomise(transformer)
    after = subject.velocity()
    if subject.far(after, before, before.abs().mean().item()) is None:
        return f"a LoRA with random weights on {len(bound)} layers leaves the velocity as it was"
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(subject.velocity().sum(), list(trained.values()), allow_unused=True)
    lost = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    if lost:
        return f"{len(lost)} of its weights have no gradient, {lost[0]} among them: leave them out, or tie them in"
    transformer.disable_adapters()
    without = subject.velocity()
    transformer.enable_adapters()
    return None if torch.equal(without, before) else "with the LoRA turned off, the velocity is not the base model's"


def randomise(transformer: Any) -> None:
    """Gives the LoRA's B random weights, so that it does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".lora_B." in name:
                noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                parameter.copy_(noise.to(parameter.device) / 4)


def _lora_exports(subject: Subject) -> str | None:
    """Exports the LoRA so that plain diffusers generates the same images from its weights alone, without alpha."""
    size, guidance_scale = subject.sizes[0], subject.guidance_scales[-1]
    base = subject.their_images(size, guidance_scale)
    with tempfile.TemporaryDirectory() as folder:
        save_lora(subject.flow, Path(folder))
        file = Path(folder) / LORA_FILE
        settings = settings_in(read_settings(file))
        subject.plain.load_lora_weights(load_file(file))
    if settings.get("lora_alpha", 2) != 2 or settings.get("use_rslora") or settings.get("alpha_pattern"):
        return (
            "the file's metadata has an alpha that is not the rank: "
            "fold the scale into the weights (flows/lora_folding.py)"
        )
    ours, theirs = subject.our_images(size, guidance_scale), subject.their_images(size, guidance_scale)
    if subject.far(theirs, base) is None:
        return "the file changes nothing in plain diffusers"
    largest = subject.far(ours, theirs)
    if largest is None:
        return None
    return f"pixels differ by up to {largest:.2e}: is the scale, alpha / rank, in the weights (flows/lora_folding.py)?"


CHECKS: tuple[Check, ...] = (
    (_loads, True),
    (_has_the_same_grid, False),
    (_conditioning_is_a_batch, False),
    (_does_not_see_the_batch, False),
    (_decodes_images, False),
    (_generates_the_same, False),
    (_lora_binds, True),
    (_lora_exports, False),
)
"""Each check, and whether those after it make no sense if it fails."""
