"""Sharding by FSDP2: every `fully_shard` of the package, and what sharded weights need elsewhere.

DDP needs nothing here: a pair stays on the process that made it, and Lightning averages the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module

from lightning_fdfo.errors import ConfigurationError


def check_strategy(strategy: Any) -> None:
    """Refuses what cannot work, before any model is loaded.

    Raises:
        ConfigurationError: processes that are forked or spawned; FSDP1 or DeepSpeed; FSDP2 that splits more than the
            data, or writes checkpoints in pieces.
    """
    launcher = getattr(strategy, "launcher", None)
    if isinstance(launcher, _MultiProcessingLauncher):
        raise ConfigurationError(
            f"trainer.strategy: processes by {launcher._start_method} (ddp_spawn, ddp_fork, ddp_notebook) hand back "
            "what they train by a checkpoint of the whole model, and ours hold what trains; add "
            "configs/ddp.yaml after your configuration instead"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise ConfigurationError(
            "trainer.strategy: DeepSpeed accumulates and clips by a configuration of its own; add configs/ddp.yaml, or "
            "for models that do not fit configs/fsdp2.yaml, after your configuration instead"
        )
    if isinstance(strategy, FSDPStrategy):
        raise ConfigurationError(
            "trainer.strategy: FSDP1 (FSDPStrategy) cannot clip a gradient's norm, and breaks rollouts outside of "
            "training_step; add configs/fsdp2.yaml after your configuration instead"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if strategy._save_distributed_checkpoint:
        raise ConfigurationError(
            "trainer.strategy: expected save_distributed_checkpoint: false, as in configs/fsdp2.yaml: a checkpoint "
            "holds what trains, in one file"
        )
    sizes = (strategy._data_parallel_size, strategy._tensor_parallel_size)
    if sizes[1] not in (1, "auto") or sizes == ("auto", "auto"):
        raise ConfigurationError(
            f"trainer.strategy: expected tensor_parallel_size: 1 and data_parallel_size: the number of devices, as in "
            f"configs/fsdp2.yaml, got data_parallel_size {sizes[0]} and tensor_parallel_size {sizes[1]}"
        )


def parallelize(transformer: Module, blocks: Sequence[Module], mesh: DeviceMesh) -> None:
    """Shards a loaded transformer over devices: block by block, then the rest.

    `reshard_after_forward` stays at FSDP2's default: a block lets its weights go after its forward, and only the root
    keeps its own. A rollout is many forwards without a backward, so blocks that kept theirs would sum up to the whole
    model on each device, which is what sharding is to avoid.

    Args:
        transformer: with what trains decided (a LoRA bound, or all of it).
        blocks: its repeated blocks, in order.
        mesh: Lightning's, with a dimension `data_parallel`.
    """
    devices = mesh["data_parallel"]
    for block in blocks:
        fully_shard(block, mesh=devices)
    fully_shard(transformer, mesh=devices)


def reshard(module: Module) -> None:
    """Lets go of weights that a forward has gathered: FSDP2 keeps the root's until the next one.

    Until then `parameters()` gives them whole, and what is written there is lost.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without their shards, on the CPU; each process must call it with the same names.

    Example:
        >>> full_tensors({"A": torch.ones(2)})
        {'A': tensor([1., 1.])}
    """
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
        for name, tensor in tensors.items()
    }


def placed_as(value: Tensor, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a tensor on a parameter's device, sharded as that is.

    Args:
        value: whole, or sharded already.
        parameter: where it belongs.
        dtype: of the copy; None takes the parameter's.

    Example:
        >>> placed_as(torch.ones(2), torch.zeros(2, dtype=torch.float64))
        tensor([1., 1.], dtype=torch.float64)
    """
    copy = value.detach().to(parameter.device, dtype or parameter.dtype, copy=True)
    if isinstance(parameter, DTensor) and not isinstance(copy, DTensor):
        return distribute_tensor(copy, parameter.device_mesh, parameter.placements)
    return copy


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Sums over all processes, in double precision without a device that may not have it.

    Example:
        >>> sum_over_processes([1.0, 2.0])
        [1.0, 2.0]
    """
    if not distributed.is_initialized():
        return list(values)
    everywhere: list[Sequence[float]] = [[]] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, list(values))
    return [sum(column) for column in zip(*everywhere, strict=True)]


def all_sum(trainer: Trainer, values: Tensor) -> Tensor:
    """The sum of a tensor over the trainer's devices, on the CPU; each process must call it."""
    strategy = trainer.strategy
    reduced: Tensor = strategy.reduce(values.to(strategy.root_device), reduce_op="sum").cpu()
    return reduced
