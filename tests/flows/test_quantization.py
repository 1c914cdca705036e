from typing import get_args

import pytest
import torch
from diffusers import PipelineQuantizationConfig

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import StableDiffusion3, quantization
from lightning_fdfo.flows.diffusers_flow import DiffusersFlow
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_files import add_lora
from lightning_fdfo.flows.quantization import BYTES, LIBRARIES, Quantization, quantization_config

KINDS = get_args(Quantization)


@pytest.fixture
def cuda(monkeypatch):
    """As if there was a device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(self, **parts):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DiffusersFlow, "load_pipeline", refuse)


def flow(kind):
    return StableDiffusion3("tiny-digits", max_sequence_length=0, quantization=kind)


def test_every_kind_has_a_library_and_a_size():
    assert set(LIBRARIES) == set(BYTES) == set(KINDS)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_device_it_is_refused_before_anything_loads(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for refused in (flow(kind).validate, flow(kind).load):
        with pytest.raises(ConfigurationError, match=f"{kind} needs a CUDA device, .* leave quantization out"):
            refused()


@pytest.mark.usefixtures("cuda", "no_loading")
@pytest.mark.parametrize("kind", KINDS)
def test_without_its_library_the_extra_is_named(kind, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    message = rf"{kind} needs {LIBRARIES[kind]}: pip install 'lightning-fdfo\[quantization\]'"
    with pytest.raises(ConfigurationError, match=message):
        flow(kind).validate()


def transformer_config(kind, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: name)
    try:
        config = quantization_config(kind, torch.bfloat16)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"diffusers makes no such config without {LIBRARIES[kind]}: {error}")
    assert isinstance(config, PipelineQuantizationConfig)
    assert set(config.quant_mapping) == {"transformer"}
    return config.quant_mapping["transformer"]


@pytest.mark.usefixtures("cuda")
def test_nf4_is_qloras(monkeypatch):
    config = transformer_config("nf4", monkeypatch)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.usefixtures("cuda")
def test_int8_is_of_8_bits(monkeypatch):
    config = transformer_config("int8", monkeypatch)
    assert config.load_in_8bit
    assert not config.load_in_4bit


@pytest.mark.usefixtures("cuda")
def test_int8_by_torchao_is_of_weights_alone(monkeypatch):
    config = transformer_config("int8_torchao", monkeypatch)
    assert type(config.quant_type).__name__ == "Int8WeightOnlyConfig"


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_cannot_train(kind):
    with pytest.raises(ConfigurationError, match="quantised weights cannot train; use a LoRA"):
        flow(kind).train_all()


def test_int8_by_torchao_trains_a_lora_and_stays_near_the_base(monkeypatch):
    """It works on the CPU too, which is refused for its slowness: what holds here holds on a device."""
    pytest.importorskip("torchao")
    plain, quantised = flow(None), flow("int8_torchao")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        config = quantization_config("int8_torchao", torch.float32)
    monkeypatch.setattr("lightning_fdfo.flows.pipeline_source.quantization_config", lambda *_: config)
    for each in (plain, quantised):
        each.load()
    latents = torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    conditioning = plain.encode(['"427" in red', '"8"'])
    with torch.no_grad():
        base, near = (each.velocity(latents, torch.tensor(0.5), conditioning) for each in (plain, quantised))
    assert 1e-5 < (near - base).norm() / base.norm() < 0.03
    names = add_lora(quantised, LoRA(rank=2, alpha=2), seed=0)
    quantised.velocity(latents, torch.tensor(0.5), conditioning).square().mean().backward()
    trained = {name: p for name, p in quantised.transformer.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(names)
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert trained["transformer_blocks.0.attn.to_q.lora_B.default.weight"].grad.norm() > 0
