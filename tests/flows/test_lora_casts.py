"""A LoRA layer's input is copied to float32 only where no autocast is active, and every bit stays as it was."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fdfo.flows import StableDiffusion3
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_files import add_lora, adopt_lora, save_lora

LORAS = {
    "lora": LoRA(rank=2, alpha=4),
    "rslora": LoRA(rank=2, alpha=4, rslora=True),
    "dora": LoRA(rank=2, alpha=4, dora=True),
    "dropout": LoRA(rank=2, alpha=4, dropout=0.3),
}


class Casts(TorchDispatchMode):
    """Counts copies of bfloat16 tensors to float32, by the number of axes."""

    def __init__(self):
        super().__init__()
        self.axes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (args[0].dtype, result.dtype) == (torch.bfloat16, torch.float32):
            self.axes[args[0].ndim] += 1
        return result


def loaded(dtype="bfloat16"):
    flow = StableDiffusion3("tiny-digits", dtype=dtype, max_sequence_length=0)
    flow.load()
    return flow


def bound(lora):
    flow = loaded()
    add_lora(flow, lora, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in flow.transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 16)
    return flow


def with_pefts_cast(flow):
    """As PEFT has made its layers."""
    for layer in flow.transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.__dict__.pop("_cast_input_dtype", None)
    return flow


def velocity_and_gradients(flow, conditioning, precision):
    """With what trains in training mode, so that dropout acts."""
    latents = torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(1))
    for name, module in flow.transformer.named_modules():
        module.train(".lora_dropout." in name)
    torch.manual_seed(3)
    with Casts() as casts, precision:
        velocity = flow.velocity(latents, torch.tensor([0.9, 0.3]), conditioning)
    trained = [parameter for parameter in flow.transformer.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(velocity.square().mean(), trained)
    return [velocity.detach(), *gradients], casts.axes[3]


@pytest.mark.parametrize("name", LORAS)
def test_under_autocast_no_bit_changes(name, conditioning):
    autocast = torch.autocast("cpu", torch.bfloat16)
    ours, _ = velocity_and_gradients(bound(LORAS[name]), conditioning, autocast)
    pefts, _ = velocity_and_gradients(with_pefts_cast(bound(LORAS[name])), conditioning, autocast)
    assert all(torch.equal(one, other) for one, other in zip(ours, pefts, strict=True))
    assert sum(bool(gradient.any()) for gradient in ours) > 0.9 * len(ours)


@pytest.mark.parametrize("origin", ["new", "of a file"])
def test_under_autocast_no_input_is_copied_to_float32(origin, conditioning, tmp_path):
    flow = bound(LORAS["lora"])
    if origin == "of a file":
        save_lora(flow, tmp_path)
        flow = loaded()
        adopt_lora(flow, tmp_path / "pytorch_lora_weights.safetensors")
    num_layers = sum(isinstance(layer, LoraLayer) for layer in flow.transformer.modules())
    autocast = torch.autocast("cpu", torch.bfloat16)
    _, with_base_casts = velocity_and_gradients(flow, conditioning, autocast)
    _, with_all = velocity_and_gradients(with_pefts_cast(flow), conditioning, autocast)
    assert with_all - with_base_casts == num_layers


@pytest.mark.parametrize("precision", [nullcontext(), torch.autocast("cpu", enabled=False)], ids=["none", "off"])
def test_without_autocast_a_bfloat16_model_has_the_cast_that_it_needs(precision, conditioning):
    """`trainer.precision: 32-true` with `flow.dtype: bfloat16`."""
    ours, casts = velocity_and_gradients(bound(LORAS["lora"]), conditioning, precision)
    pefts, pefts_casts = velocity_and_gradients(with_pefts_cast(bound(LORAS["lora"])), conditioning, precision)
    assert casts == pefts_casts > 0
    assert all(torch.equal(one, other) for one, other in zip(ours, pefts, strict=True))
