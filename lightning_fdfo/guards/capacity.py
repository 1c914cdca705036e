"""Whether a run can fit: what it certainly needs, against the memory that is available.

    CPU's memory = an epoch's stored rollout, of each process of this machine
    device       = weights, what trains, and the larger of a rollout's chunk and a training batch

Only what is certain is refused: activations, the rewards' models and the allocator's slack come on top. What is likely
to be too much is reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import format_bytes
from lightning_fdfo.flows.lora import check_rank, lora_numel
from lightning_fdfo.flows.quantization import BYTES
from lightning_fdfo.guards import memory
from lightning_fdfo.training.base_weights import has_lora
from lightning_fdfo.training.protocol import TrainingModule

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container finds how much memory it may take."""
WEIGHT_AND_GRADIENT = 2
"""Numbers a weight that trains, whatever the optimiser."""
CHANNELS, KEPT, STEP = 3, 3, 3
"""Of an image; tensors of a point's size in a batch: latents, velocity and direction; those of a step of the
sampler: latents, velocity and noise."""


class Need(NamedTuple):
    """What takes memory."""

    what: str
    least: int
    """bytes, for certain"""
    likely: int
    """bytes"""
    settings: str
    """that it comes from"""


def check_fits(module: TrainingModule, stage: str) -> None:
    """`check_capacity` before the model is loaded, if its flow has an outline of it; else once it is.

    Args:
        module: attached to a trainer.
        stage: `fit`, or another command, which trains nothing.

    Raises:
        ConfigurationError: sizes, ranks or counts that the model or the memory here cannot take.
    """
    transformer = getattr(module.flow, "transformer", None) or module.flow.outline()
    if transformer is not None and not has_lora(transformer):
        check_capacity(module, transformer, fit=stage == "fit")


def check_capacity(module: TrainingModule, transformer: nn.Module, fit: bool = True) -> None:
    """Refuses a run that cannot fit, before it works without end or is killed; warns of one that may not.

    Args:
        module: attached to a trainer; its flow's `latent_shape` works.
        transformer: the flow's, loaded or on the meta device, without a LoRA.
        fit: whether it is to be trained.

    Raises:
        ConfigurationError: an image's size does not fit the model; a LoRA's rank is above its layers' widths; what is
            certain is more memory than there is.
    """
    sampling, lora = module.sampling, module.lora
    numel = torch.Size(module.flow.latent_shape(sampling.height, sampling.width)).numel()
    weights = [_frozen(module, transformer)]
    if fit and lora is not None and module.lora_file is None:
        targets = lora.targets or module.flow.lora_targets
        check_rank(transformer, lora, targets)
        weights.append(_trained(lora_numel(transformer, lora, targets), f"lora.rank={lora.rank}"))
    elif fit and lora is None:
        weights = [_trained(_count(transformer), "lora=null, which trains all weights")]
    if isinstance(module.trainer.strategy, ModelParallelStrategy):
        devices = module.trainer.world_size
        weights = [one._replace(least=one.least // devices, likely=one.likely // devices) for one in weights]
    processes = module.trainer.num_devices
    at_rest = _at_rest(module, numel, processes) if fit else []
    device = [*weights, *_work(module, numel, fit)]
    if module.trainer.strategy.root_device.type == "cuda":
        _check(at_rest, "main memory", main_memory(), psutil.virtual_memory().available)
        index = module.trainer.strategy.root_device
        total = torch.cuda.get_device_properties(index).total_memory
        _check(device, f"the memory of {index}", total, total)
    else:  # the CPU, or what shares its memory
        each = [one._replace(least=one.least * processes, likely=one.likely * processes) for one in device]
        _check([*at_rest, *each], "main memory", main_memory(), psutil.virtual_memory().available)


def main_memory() -> int:
    """Bytes of main memory that this process may take: the machine's, or its container's limit."""
    sizes: list[int] = [psutil.virtual_memory().total]
    for path in map(Path, LIMITS):
        try:
            sizes.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no container, or one without a limit
            continue
    return min(sizes)


def _check(needs: Sequence[Need], where: str, there: int, free: int) -> None:
    least, likely = sum(one.least for one in needs), sum(one.likely for one in needs)
    if least > there:
        listed = _listed(needs, [one.least for one in needs])
        raise ConfigurationError(
            f"this run cannot fit: it takes at least {format_bytes(least)} of {where}, which has "
            f"{format_bytes(there)}: {listed}; make these settings smaller"
        )
    if likely > min(there, free):
        listed = _listed(needs, [one.likely for one in needs])
        warnings.warn(
            f"this run may not fit: it is likely to take {format_bytes(likely)} of {where}, of which "
            f"{format_bytes(min(there, free))} are free: {listed}",
            stacklevel=3,
        )


def _listed(needs: Sequence[Need], sizes: Sequence[int]) -> str:
    """The larger ones first, and none that is below a hundredth of all."""
    largest = sorted(zip(sizes, needs, strict=True), key=lambda pair: pair[0], reverse=True)
    return "; ".join(
        f"{need.what} {format_bytes(size)} ({need.settings})" for size, need in largest if size > sum(sizes) / 100
    )


def _frozen(module: TrainingModule, transformer: nn.Module) -> Need:
    """The base model, in the dtype that the flow says, or has."""
    flow, quantization = module.flow, getattr(module.flow, "quantization", None)
    dtype = getattr(flow, "dtype", None)
    if hasattr(flow, "transformer") or not isinstance(dtype, torch.dtype):
        size = sum(parameter.nbytes for parameter in transformer.parameters())
    else:
        size = memory.weight_bytes(_count(transformer), BYTES[quantization] if quantization else dtype.itemsize)
    settings = f"flow.pretrained={getattr(flow, 'pretrained', type(flow).__name__)}"
    return Need("the base model's weights", size, size, settings + (f", dtype={dtype}" if dtype else ""))


def _trained(numel: int, settings: str) -> Need:
    least = memory.FLOAT32 * WEIGHT_AND_GRADIENT * numel
    return Need("what trains, with its gradient", least, memory.training_state_bytes(numel), settings)


def _at_rest(module: TrainingModule, numel: int, processes: int) -> list[Need]:
    """The rollout of this machine's processes."""
    sampling, points = module.sampling, _points(module)
    added = memory.added_latents(points, gradient_terms(module), module.algorithm is not None)
    size = processes * memory.rollout_bytes(_pairs(module), points, numel, 0, sampling.store_dtype.itemsize, added)
    settings = f"num_pairs={module.batching.num_pairs}, {points} points a pair, {sampling.height} x {sampling.width}"
    return [Need("an epoch's rollout", size, size, settings)]


def gradient_terms(module: TrainingModule) -> int:
    """How many terms of the mixture train by their gradient in some epoch."""
    return sum(term.gradient and not term.is_watched for term in module.rewards.terms.values())


def _work(module: TrainingModule, numel: int, fit: bool) -> list[Need]:
    """A chunk of the rollout with its images, or a batch of points: whichever is larger.

    Of each step of the sampler a chunk has its sigma, and for each branch a byte: whether its velocity is finite.
    """
    if not fit:
        return []
    sampling = module.sampling
    pairs = min(module.batching.rollout_batch_size, _pairs(module))
    images = memory.BRANCHES * pairs * CHANNELS * sampling.height * sampling.width * memory.FLOAT32
    step = memory.BRANCHES * pairs * STEP * numel * memory.FLOAT32
    chunk = step + images + sampling.num_steps * (memory.BRANCHES * pairs + memory.FLOAT32)
    if module.trainer.strategy.root_device.type != "cpu":  # on the CPU steps write into the rollout at rest
        chunk += memory.rollout_bytes(pairs, _points(module), numel, 0, sampling.store_dtype.itemsize)
    points = min(module.batching.batch_size, _points(module) * _pairs(module))
    batch = KEPT * points * numel * memory.FLOAT32
    settings = f"{sampling.height} x {sampling.width}"
    if chunk >= batch:
        sizes = f"rollout_batch_size={module.batching.rollout_batch_size}, num_steps={sampling.num_steps}"
        settings = f"{sizes}, {settings}"
        return [Need("pairs that are rolled out at once", chunk, chunk, settings)]
    return [Need("a batch of points", batch, batch, f"batch_size={module.batching.batch_size}, {settings}")]


def _pairs(module: TrainingModule) -> int:
    """Of a device, whether or not the plan works out: numbers that are too large are the first thing to say."""
    return max(module.batching.num_pairs // module.trainer.world_size, 0)


def _points(module: TrainingModule) -> int:
    """Of a pair, that are trained on."""
    return module.batching.num_points_per_pair or memory.BRANCHES * module.sampling.num_steps


def _count(transformer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in transformer.parameters())
