"""`flow.compile`: the transformer by torch.compile, block by block or as a whole, in place.

Names of weights stay, and so do checkpoints and LoRA files. A graph is made for each kind of block and for each use of
it: rollout, training, and the base model with its LoRA switched off. The number of rows is a constant of the first
graph; at the first other number one more is made in which it is a variable, and that serves all but a single row.
So all graphs are made in the first epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from lightning_fdfo.errors import ConfigurationError

Compile = Literal["none", "regional", "full"]
"""Not at all, each repeated block, or the whole transformer."""
BACKEND = "inductor"
"""Of torch.compile."""
MOST_GRAPHS = 64
"""Of a function. PyTorch stops at 8, and then runs what is left uncompiled: kinds of blocks times uses are more."""


def check_compile(how: Compile, num_block_lists: int, family: str) -> None:
    """Checks, before a model is loaded, that its transformer can be compiled.

    Args:
        how: `flow.compile`.
        num_block_lists: lists of repeated blocks that the family names.
        family: its name, for the message.

    Raises:
        ConfigurationError: the family has no repeated blocks, or a compiler is missing.

    Example:
        >>> check_compile("regional", 0, "MyFlow")
        Traceback (most recent call last):
        lightning_fdfo.errors.ConfigurationError: flow.compile: regional compiles repeated blocks, and MyFlow has ...
    """
    if how == "none":
        return
    if how == "regional" and not num_block_lists:
        raise ConfigurationError(
            f"flow.compile: regional compiles repeated blocks, and {family} has none (block_names); expected full or "
            "none"
        )
    _check_compilers(how)


def _check_compilers(how: Compile) -> None:
    """Raises ConfigurationError unless there is what TorchInductor compiles with."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigurationError(
            f"flow.compile: {how} needs a C++ compiler, and none is found: install g++, name one in the environment "
            "variable CXX, or set compile: none"
        ) from error
    if torch.cuda.is_available() and find_spec("triton") is None:
        raise ConfigurationError(
            f"flow.compile: {how} needs Triton for a CUDA device: pip install triton, or set compile: none"
        )


def compile_in_place(how: Compile, transformer: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Compiles a transformer, or its blocks, at their first call; names of parameters and buffers stay.

    What diffusers' `compile_repeated_blocks` does for models that declare such blocks; Stable Diffusion 3 and SANA do
    not.

    Args:
        how: `flow.compile`.
        transformer: with what trains decided.
        blocks: its repeated blocks.

    Example:
        >>> blocks = nn.ModuleList([nn.Linear(2, 2)])
        >>> compile_in_place("regional", blocks, list(blocks))
        >>> list(blocks.state_dict())
        ['0.weight', '0.bias']
    """
    if how == "none":
        return
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, MOST_GRAPHS)
    for module in [transformer] if how == "full" else blocks:
        module.compile(backend=BACKEND)
