"""Quantised weights for the frozen transformer: less memory, at the cost of a slightly different base model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch

from lightning_fdfo.errors import ConfigurationError

Quantization = Literal["nf4", "int8", "int8_torchao"]
LIBRARIES: dict[Quantization, str] = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8_torchao": "torchao"}
BYTES: dict[Quantization, float] = {"nf4": 0.5, "int8": 1.0, "int8_torchao": 1.0}
"""Of memory, a weight."""


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """What diffusers' `from_pretrained` takes to quantise the transformer while it is loaded.

    Args:
        quantization: `nf4` (4 bits, QLoRA's, arXiv 2305.14314) or `int8` (LLM.int8(), arXiv 2208.07339) by
            bitsandbytes; `int8_torchao` (weights only) by torchao.
        dtype: that it computes in.

    Raises:
        ConfigurationError: no CUDA device, or the library is not installed.
    """
    library = LIBRARIES[quantization]
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"flow.quantization: {quantization} needs a CUDA device, and there is none here; leave quantization out"
        )
    if find_spec(library) is None:
        raise ConfigurationError(
            f"flow.quantization: {quantization} needs {library}: pip install 'lightning-fdfo[quantization]'"
        )
    from diffusers import PipelineQuantizationConfig

    return PipelineQuantizationConfig(quant_mapping={"transformer": _transformer_config(quantization, dtype)})


def _transformer_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
