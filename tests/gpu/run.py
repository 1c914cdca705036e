"""Runs one case in processes of its own, and tells what it measured or why it failed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests import processes
from tests.gpu.build import write_model
from tests.gpu.cases import ROOT, Case, read_settings, reason_to_skip, write_config
from tests.gpu.sizes import Sizes, measure

BF16_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L40": 181,
    "A10G": 70, "A10": 125, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
"""Dense, with float32 sums, from the makers' data sheets; the first name that a card's name holds counts."""


@dataclass(frozen=True)
class Device:
    """What the cases run on: its name, bytes of memory, whether it is a GPU, and its peak if it is known."""

    name: str
    memory: int
    cuda: bool

    @property
    def peak_flops(self) -> float | None:
        """A second, in bfloat16."""
        known = (1e12 * tflops for name, tflops in BF16_TFLOPS.items() if name in self.name)
        return next(known, None) if self.cuda else None


class CaseFailed(Exception):  # noqa: N818 - what it says
    """A case did not do what it should; the message is one line."""


class Session:
    """The cases of one call: where their files are, and what they run on.

    Args:
        folder: models are written to it and found again; each case has a folder below `runs`, which is made anew.
        device: what they run on.
        toy: whether everything is small, and forked from one process in place of starting the command.
        t5_layers: see `build.components`.
    """

    def __init__(self, folder: Path, device: Device, toy: bool, t5_layers: int | None = None) -> None:
        self.folder, self.device, self.toy, self.t5_layers = folder.absolute(), device, toy, t5_layers
        self.sizes: dict[str, Sizes] = {}
        self.command: Callable[[Sequence[str]], processes.Result] = processes.run if toy else start

    def run(self, case: Case) -> dict[str, Any]:
        """A case's row: `status` is passed, failed or skipped, the last two with a `reason`."""
        folder = self.folder / "runs" / case.name
        shutil.rmtree(folder, ignore_errors=True)
        model = self.folder / f"{case.model}-{'toy' if self.toy else self.t5_layers or 'full'}"
        files = write_config(case, folder, model, self.toy)
        settings = read_settings(files)
        if case.model not in self.sizes:  # all cases have its image size, LoRA and tokens
            sketch = self.folder / f"{model.name}-without-weights"
            write_model(case.model, sketch, self.toy, self.t5_layers, weights=False)
            self.sizes[case.model] = measure(case.model, sketch, settings, self.toy, self.t5_layers)
        sizes = self.sizes[case.model]
        row: dict[str, Any] = {"name": case.name, "model": case.model, "overlays": case.overlays}
        row |= {"sizes": asdict(sizes), "formula": sizes.memory(settings), "texts": sizes.texts()}
        reason = reason_to_skip(settings, sizes, self.device.memory, self.device.cuda)
        if reason is not None:
            return row | {"status": "skipped", "reason": reason}
        write_model(case.model, model, self.toy, self.t5_layers)
        try:
            found = self._resumed(files, folder) if case.resume else self._measured(files, folder, settings, sizes)
        except CaseFailed as error:
            return row | {"status": "failed", "reason": str(error)}
        return row | {"status": "passed"} | found

    def _measured(self, files: list[Path], folder: Path, settings: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Speeds of the last epoch, and peaks."""
        self._fit(files)
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        last, flops = record["epochs"][-1], sizes.epoch(settings)
        seconds = {part: last[part]["seconds"] for part in ("rollout", "training")}
        whole, images = sum(seconds.values()), 2 * settings["model"]["batching"]["num_pairs"]
        peak = self.device.peak_flops
        return {
            "images_per_second": images / whole,
            "rollout_images_per_second": images / seconds["rollout"],
            "training_images_per_second": images / seconds["training"],
            "tflops": sum(flops.values()) / whole / 1e12,
            "share_of_peak": sum(flops.values()) / whole / peak if peak else None,
            "training_share_of_peak": flops["training"] / seconds["training"] / peak if peak else None,
            "rollout_share_of_peak": flops["rollout"] / seconds["rollout"] / peak if peak else None,
            "record": record,
        }

    def _resumed(self, files: list[Path], folder: Path) -> dict[str, Any]:
        """The largest difference of what trains, between a run that was stopped and one that was not."""
        whole, stopped = (f"--trainer.default_root_dir={folder / name}" for name in ("whole", "stopped"))
        self._fit(files, whole)
        self._fit(files, stopped, "--trainer.max_epochs=1")
        self._fit(files, stopped, "--ckpt_path=last")
        one, other = (
            torch.load(folder / name / "checkpoints/last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
            for name in ("whole", "stopped")
        )
        if set(one) != set(other):
            raise CaseFailed(f"a resumed run trains other weights: {sorted(set(one) ^ set(other))[:3]}")
        difference = max((one[name].float() - other[name].float()).abs().max().item() for name in one)
        if difference and not self.device.cuda:
            raise CaseFailed(f"a resumed run ends with other weights, by up to {difference:.3g}")
        return {"largest_difference": difference}

    def _fit(self, files: list[Path], *more: str) -> None:
        words = ["fit", *(word for file in files for word in ("--config", str(file))), *more]
        done = self.command(words)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no output"]
            raise CaseFailed(f"exit code {done.returncode}: {lines[-1].strip()}")


def start(words: Sequence[str]) -> processes.Result:
    """Runs the command in a new process, as a shell would."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_fdfo", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return processes.Result(done.returncode, done.stdout, done.stderr)
