"""Reads a file of golden numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

NAMES = ("public_noguidance", "public_guidance")


class GoldenCase(NamedTuple):
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def load(name: str) -> GoldenCase:
    with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        settings = {key: json.loads(value) for key, value in file.metadata().items()}
    return GoldenCase(tensors, settings)
