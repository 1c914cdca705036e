"""The cases: each is a run of the command with a shipped configuration and overlays, small in pairs alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from lightning_fdfo.files import format_bytes
from lightning_fdfo.flows.quantization import LIBRARIES
from tests.gpu.sizes import Sizes

ROOT = Path(__file__).parents[2]
CONFIGS = {"sd35_medium": "sd35_medium_pickscore", "flux_dev": "flux_dev"}
PAIRS = {"model": {"batching": {"num_pairs": 8}}}
FEW_STEPS = {"model": {"sampling": {"num_steps": 8}}}
"""Where it is not the speed that is asked for."""
TOY = {
    "model": {
        "sampling": {"num_steps": 4, "height": 64, "width": 64},
        "batching": {"num_pairs": 2, "updates_per_epoch": 2, "batch_size": 2, "rollout_batch_size": 2},
    }
}
TOY_POINTS = {"model": {"batching": {"num_points_per_pair": 2}}}
CONTEXT = 2**30
"""Bytes that CUDA and the allocator keep, at least."""


def _flow(**options: Any) -> dict[str, Any]:
    return {"model": {"flow": {"init_args": options}}}


@dataclass(frozen=True)
class Case:
    """A run, or several that belong together.

    Args:
        name: what `--only` and the table call it.
        overlays: of `configs/`, in order.
        changes: settings laid over them.
        model: whose weights are random.
        epochs: the last of them is measured; those before it warm up.
        profile: whether the last epoch's kernels are listed.
        resume: whether to stop after the first epoch, go on, and compare with a run that was not stopped.
    """

    name: str
    overlays: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    model: str = "sd35_medium"
    epochs: int = 2
    profile: bool = False
    resume: bool = False


CASES = (
    Case("base"),
    Case("20-of-80", changes={"model": {"batching": {"num_points_per_pair": 20}}}),
    Case("compile", changes=_flow(compile="regional")),
    Case("80gb", ("single_gpu_80gb",)),
    Case("80gb-compile", ("single_gpu_80gb",), _flow(compile="regional")),
    Case("24gb", ("single_gpu_24gb",)),
    Case("24gb-int8", ("single_gpu_24gb",), _flow(quantization="int8")),
    Case("24gb-unquantised", ("single_gpu_24gb",), _flow(quantization=None)),
    Case("ddp", ("ddp",)),
    Case("fsdp2", ("fsdp2",)),
    Case("multi_node", ("multi_node",), {"trainer": {"num_nodes": 1}}),
    Case("resume", changes=FEW_STEPS, resume=True),
    Case("profile", changes=FEW_STEPS, profile=True),
    Case("flux-24gb", ("single_gpu_24gb",), model="flux_dev", epochs=1),
    Case("flux-80gb", ("single_gpu_80gb",), model="flux_dev", epochs=1),
)


def write_config(case: Case, folder: Path, model: Path, toy: bool) -> list[Path]:
    """Writes what a case changes, and its prompts; gives the configuration files in their order.

    Args:
        case: which.
        folder: for these files and for the run, whose folder is `run` in it.
        model: the pipeline's folder.
        toy: whether on the CPU, with few steps and small images.
    """
    folder.mkdir(parents=True)
    prompts = (ROOT / "configs/prompts/photos_train.txt").read_text(encoding="utf-8").splitlines()
    for name, number in (("train", 8), ("val", 2)):
        (folder / f"{name}.txt").write_text("\n".join(prompts[:number]) + "\n", encoding="utf-8")
    init_args = {"file": str(folder / "record.json"), "profile": case.profile}
    own = {
        "model": {
            "flow": {"init_args": {"pretrained": str(model), "text_cache": str(folder / "texts")}},
            "rewards": {"JPEGSize": 1.0},
        },
        "data": {name: str(folder / f"{name}.txt") for name in ("train", "val")},
        "trainer": {
            "accelerator": "cpu" if toy else "gpu",
            "devices": 1,
            "max_epochs": case.epochs,
            "enable_progress_bar": False,
            "default_root_dir": str(folder / "run"),
            "callbacks+": [{"class_path": "tests.gpu.record.Record", "init_args": init_args}],
        },
    }
    layers: list[Mapping[str, Any]] = [PAIRS, case.changes, own]
    if toy:
        fewer = "num_points_per_pair" in case.changes.get("model", {}).get("batching", {})
        layers += [TOY, TOY_POINTS if fewer else {}]
    changed = folder / "case.yaml"
    changed.write_text(yaml.safe_dump(OmegaConf.to_container(OmegaConf.merge(*layers))), encoding="utf-8")
    return [*(ROOT / f"configs/{name}.yaml" for name in (CONFIGS[case.model], *case.overlays)), changed]


def read_settings(files: list[Path]) -> dict[str, Any]:
    """Configuration files laid one over the other, as the command lays them, but for lists that grow."""
    settings: Any = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, files)), resolve=True)
    return dict(settings)


def reason_to_skip(settings: Mapping[str, Any], sizes: Sizes, memory: int, cuda: bool) -> str | None:
    """Why a case cannot run here, or None.

    Args:
        settings: of the run, resolved.
        sizes: of its model.
        memory: bytes of the device.
        cuda: whether it is a GPU.
    """
    quantization = settings["model"]["flow"]["init_args"].get("quantization")
    if quantization and not cuda:
        return f"{quantization} needs a CUDA device"
    if quantization and find_spec(LIBRARIES[quantization]) is None:
        return f"{quantization} needs {LIBRARIES[quantization]}: pip install 'lightning-fdfo[quantization]'"
    parts = sizes.memory(settings) | {"CUDA": CONTEXT if cuda else 0}
    if sum(parts.values()) > memory:
        listed = " + ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        return f"does not fit: {listed} = {format_bytes(sum(parts.values()))} of {format_bytes(memory)}"
    if sizes.texts() > memory:
        return f"does not fit: text encoders {format_bytes(sizes.texts())} of {format_bytes(memory)}"
    return None
