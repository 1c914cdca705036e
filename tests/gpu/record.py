"""Record: a callback that writes how long a run's epochs took, and how much memory was in use at most."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lightning_fdfo.files import write_text

STATUS = Path("/proc/self/status")
MOST = 40
"""Kernels that are listed."""


class Record(Callback):
    """Writes a file when training ends: seconds and peaks of the start, and of each epoch's rollout and training.

        {"start": PART, "epochs": [{"rollout": PART, "training": PART}, …], "host_peak": bytes or null}
        PART = {"seconds": …, "peak": bytes of the allocator's tensors, "reserved": bytes, null without CUDA}

    Args:
        file: where to.
        profile: whether to list the last epoch's kernels, too, which takes its time: {"kernels": [{"name": …,
            "calls": …, "seconds": …}, …]}, the longest first; on a CPU, operations.
    """

    def __init__(self, file: str, profile: bool = False) -> None:
        self.file, self.profile = file, profile
        self.found: dict[str, Any] = {"epochs": []}
        self._begin = time.perf_counter()
        self._profiler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["start"] = self._part()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._part()
        self.found["epochs"].append({})
        if self.profile and trainer.current_epoch + 1 == trainer.max_epochs:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True)
            self._profiler.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not batch_idx:
            self.found["epochs"][-1]["rollout"] = self._part()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["epochs"][-1]["training"] = self._part()
        if self._profiler is not None:
            self._profiler.stop()
            self.found["kernels"] = kernels(self._profiler)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write_text(self.file, json.dumps(self.found | {"host_peak": host_peak()}, indent=2))

    def _part(self) -> dict[str, Any]:
        """What came since the last call; the device has done all that it was given."""
        peak = reserved = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            torch.cuda.reset_peak_memory_stats()
        begin, self._begin = self._begin, time.perf_counter()
        return {"seconds": self._begin - begin, "peak": peak, "reserved": reserved}


def kernels(profiler: profile) -> list[dict[str, Any]]:
    """Those that took longest, by themselves."""
    cuda = torch.cuda.is_available()
    found = [
        {
            "name": event.key,
            "calls": event.count,
            "seconds": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6,
        }
        for event in profiler.key_averages()
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU) and not event.is_user_annotation
    ]
    return sorted(found, key=lambda kernel: kernel["seconds"], reverse=True)[:MOST]


def host_peak() -> int | None:
    """The most main memory that this program has had, in bytes; None where the system does not tell."""
    if not STATUS.exists():
        return None
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])
