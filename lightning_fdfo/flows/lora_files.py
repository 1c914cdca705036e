"""A flow's LoRA and its file: add, read, check, fill and save. They work for every FlowModel.

    settings --add_lora--> a LoRA that trains --save_lora--> pytorch_lora_weights.safetensors, which diffusers loads
    a file --adopt_lora--> the LoRA that the file holds;   --fill_lora--> its weights in the LoRA that there is

A file's scale is folded into its weights (`lora_folding.py`), and two files of the same LoRA are the same bytes.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import is_first_process
from lightning_fdfo.finite import check_finite_weights
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.lora import LoRA, bind_lora
from lightning_fdfo.flows.lora_contents import PREFIX, check_layers, copy_into_lora, lora_in_file, settings_in
from lightning_fdfo.flows.lora_folding import folded
from lightning_fdfo.parallel import full_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"
"""As diffusers names it."""
METADATA = "lora_adapter_metadata"
"""Key of a file's header under which diffusers keeps PEFT's settings, as JSON."""


# A flow's LoRA


def add_lora(flow: FlowModel, lora: LoRA, seed: int) -> list[str]:
    """Adds a LoRA to a loaded flow and makes it the only thing that trains, in float32.

    Args:
        flow: loaded, without a LoRA.
        lora: its settings.
        seed: its initial weights are a function of this.

    Returns:
        Names of the layers that it binds.

    Raises:
        ConfigurationError: a target matches no linear layer, or `init_lora` does not fit.
    """
    bound = bind_lora(flow.transformer, lora, lora.targets or flow.lora_targets, seed)
    if lora.init_lora is not None:
        fill_lora(flow, Path(lora.init_lora))
    return bound


def adopt_lora(flow: FlowModel, file: Path) -> LoRA:
    """Adds the LoRA that a file holds, of whatever rank and on whatever layers.

    Args:
        flow: loaded, without a LoRA.
        file: a LoRA file.

    Returns:
        Its settings.

    Raises:
        ConfigurationError: the file holds no LoRA of this transformer's, or not all of one.
    """
    state, metadata = read_lora(flow, file)
    lora = lora_in_file(state, metadata, file)
    check_layers(flow.transformer, state, metadata, file)
    bind_lora(flow.transformer, lora, lora.targets or (), seed=0)
    copy_into_lora(flow.transformer, state, metadata, file)
    return lora


def fill_lora(flow: FlowModel, file: Path) -> None:
    """Copies a file's weights into the LoRA that `add_lora` has made, scaled so that they act as in the file.

    Raises:
        ConfigurationError: they do not fit it.
    """
    copy_into_lora(flow.transformer, *read_lora(flow, file), file)


def save_lora(flow: FlowModel, folder: Path) -> None:
    """Writes a flow's LoRA into a folder as `pytorch_lora_weights.safetensors`, which diffusers loads.

    Each process must call it, for weights may be sharded; the first one writes.

    Raises:
        DivergenceError: a weight is not finite; nothing is written.
    """
    transformer: Any = flow.transformer
    weights, settings = folded(full_tensors(get_peft_model_state_dict(transformer)), peft_settings(transformer))
    check_finite_weights(weights)
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / LORA_FILE, _prefixed(weights), _prefixed(settings))


# Reading files


def read_lora(flow: FlowModel, file: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """The weights of a LoRA file, as `transformer.LAYER.lora_A.weight` and so on, and PEFT's settings.

    Args:
        flow: whose it is; it need not be loaded. Its `lora_reader` converts other trainers' formats.
        file: a LoRA file.

    Raises:
        ConfigurationError: it cannot be read.
    """
    if flow.lora_reader is not None:
        return _converted(flow.lora_reader, type(flow).__name__, file)
    try:
        return load_file(file), settings_in(read_settings(file))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigurationError(f"LoRA {file}: expected a .safetensors file: {error}") from error


def _converted(reader: Callable[..., Any], model: str, file: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """By diffusers' `lora_state_dict`; `model` is for messages."""
    options = {"weight_name": file.name, "return_lora_metadata": True}
    try:
        if "return_alphas" in inspect.signature(reader).parameters:  # it drops them unless they are asked for
            state, alphas, metadata = reader(file.parent, return_alphas=True, **options)
        else:
            (state, metadata), alphas = reader(file.parent, **options), None
    except Exception as error:  # its converters raise many kinds for a file that is of another model or format
        raise ConfigurationError(
            f"LoRA {file}: diffusers cannot read it for {model}: {error}; expected "
            "transformer.LAYER.lora_A.weight and lora_B.weight, or another trainer's format for this very model"
        ) from error
    settings = settings_in(metadata or {})
    each = {n.removeprefix(PREFIX).removesuffix(".alpha"): float(a) for n, a in (alphas or {}).items()}
    settings["alpha_pattern"] = each | (settings.get("alpha_pattern") or {})
    return state, settings


def check_lora(flow: FlowModel, file: Path) -> None:
    """Raises ConfigurationError unless a file holds a complete LoRA; the flow need not be loaded."""
    lora_in_file(*read_lora(flow, file), file)


def read_settings(file: Path) -> dict[str, Any]:
    """PEFT's settings in a file's header, as diffusers writes them; none without."""
    with safe_open(file, framework="pt") as content:
        settings: dict[str, Any] = json.loads((content.metadata() or {}).get(METADATA, "{}"))
    return settings


# Writing files


def fold_file(source: Path, target: Path) -> None:
    """Copies a LoRA file by diffusers, its scale folded into its weights; one without metadata has scale 1 already."""
    settings, state = read_settings(source), load_file(source)
    own = {name: value for name, value in settings.items() if name.startswith(PREFIX)}
    weights, unscaled = folded(state, settings_in(own))
    described = settings | _prefixed(unscaled)
    if not own or described == settings:
        shutil.copyfile(source, target)
        return
    _write(target, weights, described)


def peft_settings(transformer: Any) -> dict[str, Any]:
    """PEFT's settings of a transformer's LoRA, as a file's metadata holds them; sets, whose order is random, sorted.

    Args:
        transformer: with a LoRA by `bind_lora`.
    """
    settings: dict[str, Any] = transformer.peft_config["default"].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


def _prefixed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}{name}": value for name, value in values.items()}


def _write(file: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """As diffusers' `save_lora_weights` does, with a header that is in order."""
    metadata = {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    save_file(dict(weights), file, metadata)
    sort_metadata(file)


def sort_metadata(file: Path) -> None:
    """Sorts the metadata in a safetensors file's header: the library writes them in an order that is random.

    The header keeps its length, so that the tensors behind it stay where they are.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.safetensors"
        ...     save_file({"B": torch.ones(2)}, file, metadata={"format": "pt", "by": "PEFT"})
        ...     sort_metadata(file)
        ...     print(file.read_bytes()[8:55])
        b'{"__metadata__":{"by":"PEFT","format":"pt"},"B"'
    """
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise RuntimeError(f"{file}: its header of {size} bytes would take {len(text)}")
        stream.seek(8)
        stream.write(text)
