"""`flow.attention`: it reaches every attention of the transformer, and of no other model."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import StableDiffusion3, attention
from lightning_fdfo.flows.attention import BACKENDS, KERNELS, KernelProcessor, check_attention
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_files import add_lora
from tests.flows.conftest import BY_NAME

TAKES_NONE = ("StableDiffusion3", "Sana")
"""Families whose processors call PyTorch's attention themselves."""


def flow_of(case, folder_of, **options):
    return case.flow(folder_of(case.name), **options)


@torch.no_grad()
def velocity(flow, case):
    latents = torch.randn(2, *flow.latent_shape(*case.size), generator=torch.Generator().manual_seed(0))
    return flow.velocity(latents, torch.tensor([0.9, 0.3]), flow.encode(["a cat", "two dogs"], ["", ""]))


def test_math_reaches_every_attention_and_gives_the_same_velocities(representative, folder_of, loaded_flow):
    flow = flow_of(representative, folder_of, attention="_native_math")
    flow.load()
    processors = [module.processor for module in flow.transformer.modules() if hasattr(module, "processor")]
    assert processors
    for processor in processors:
        if type(flow).__name__ in TAKES_NONE:
            assert isinstance(processor, KernelProcessor)
            assert processor.kernel == torch.nn.attention.SDPBackend.MATH
        else:
            assert processor._attention_backend == AttentionBackendName._NATIVE_MATH
    expected = velocity(loaded_flow(representative.name), representative)
    assert (velocity(flow, representative) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["flash_hub", "_flash_3_hub", "sage"])
def test_code_that_the_hub_would_send_and_kernels_without_gradient_are_refused(name):
    assert name in [backend.value for backend in AttentionBackendName]
    with pytest.raises(ConfigurationError, match=rf"^flow\.attention: expected one of flash, .*, got '{name}'"):
        check_attention(name)


@pytest.mark.parametrize("name", ["sd3", "flux dev"])
def test_the_kernel_is_the_one_that_computes(name, folder_of):
    """One that the CPU does not have fails, so the name is heard."""
    flow = flow_of(BY_NAME[name], folder_of)
    flow.load()
    attention.set_attention(flow.transformer, "_native_efficient")
    with pytest.raises(RuntimeError, match="No viable backend"):
        velocity(flow, BY_NAME[name])


@pytest.mark.parametrize("name", ["sd3", "flux dev"])
def test_two_flows_of_a_process_have_each_their_own(name, folder_of):
    before = _AttentionBackendRegistry.get_active_backend()
    first, second = (flow_of(BY_NAME[name], folder_of, attention=one) for one in ("_native_math", None))
    for each in (first, second):
        each.load()
    assert _AttentionBackendRegistry.get_active_backend() == before
    for module in second.transformer.modules():
        processor = getattr(module, "processor", None)
        assert not isinstance(processor, KernelProcessor)
        assert getattr(processor, "_attention_backend", None) is None


def test_checkpointed_blocks_run_again_with_the_same_kernel(conditioning):
    gradients = []
    for checkpointing in (False, True):
        flow = StableDiffusion3(
            "tiny-digits", max_sequence_length=0, gradient_checkpointing=checkpointing, attention="_native_math"
        )
        flow.load()
        add_lora(flow, LoRA(rank=2), seed=0)
        latents = torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(1))
        flow.velocity(latents, torch.tensor(0.5), conditioning).square().mean().backward()
        gradients.append([p.grad for p in flow.transformer.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_every_name_of_diffusers_is_one_but_those_without_a_gradient_or_from_the_hub():
    names = {backend.value for backend in AttentionBackendName}
    assert set(BACKENDS) == {name for name in names if "sage" not in name and "_hub" not in name}
    assert set(KERNELS) | set(attention.ON_CPU) <= set(BACKENDS)


@pytest.mark.parametrize("name", ["math", "sage", "Native", ""])
def test_an_unknown_name_is_refused_with_the_list(name):
    flow = StableDiffusion3("tiny-digits", attention=name)
    with pytest.raises(
        ConfigurationError, match=rf"^flow.attention: expected one of flash, .*_native_math, .* got '{name}'"
    ):
        flow.validate()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flash", "Please install `flash-attn"),
        ("xformers", "Please install `xformers"),
        ("_native_efficient", "_native_efficient needs a CUDA device, .* expected one of native, "),
        ("_native_cudnn", "_native_cudnn needs a CUDA device"),
    ],
)
def test_one_that_cannot_run_here_is_refused_with_the_reason(name, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for package in ("FLASH_ATTN", "XFORMERS_ATTN"):
        monkeypatch.setattr(f"diffusers.models.attention_dispatch._CAN_USE_{package}", False)
    with pytest.raises(ConfigurationError, match=reason):
        check_attention(name)


def test_on_a_cuda_device_its_kernels_are_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in KERNELS:
        check_attention(name)


@pytest.mark.parametrize("name", ["sd3", "sana 1.0"])
def test_where_pytorch_computes_it_another_library_is_refused_before_the_model_loads(name, folder_of, monkeypatch):
    monkeypatch.setattr(attention, "check_attention", lambda name: None)
    flow = flow_of(BY_NAME[name], folder_of, attention="flex")
    with pytest.raises(ConfigurationError, match=r"by PyTorch alone: expected one of native, .* got flex"):
        flow.outline()
