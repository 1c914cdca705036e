"""(b) Where an epoch of the quick start spends its time, part by part, without validation.

Functions of the package are wrapped while the run lasts. Time belongs to the innermost part that is running, so the
parts of the main thread add up to the epoch; what none of them claims is `other`. What other threads do meanwhile is
counted apart: it is not part of the sum.
"""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

from lightning.pytorch import Callback, Trainer

from lightning_fdfo.__main__ import main
from tests.benchmarks.report import ROOT, Table
from tests.benchmarks.timing import median, within
from tests.benchmarks.tiny_flow import EpochClock, quiet

PARTS = ("noise", "encode", "sample", "decode", "reward", "statistics", "deal", "train", "log", "write", "other")
WHAT = {
    "noise": "random numbers of latents and churn",
    "encode": "prompts to conditioning",
    "sample": "the transformer in the rollout, and the sampler's arithmetic",
    "decode": "latents to images",
    "reward": "the OCR engine",
    "statistics": "image statistics; scores gathered, weighed and summed up",
    "deal": "points chosen, kept, and dealt into batches; directions",
    "train": "forward, objective, backward, gradient's check and clip, optimiser",
    "log": "means, drift from the base model, loggers, progress",
    "write": "checkpoints, tables and pictures of callbacks",
    "other": "Lightning's loops, and all else",
}
WRAPPED = {
    "noise": ("rollout.pairs:stack_normal", "rollout.pairs:generator"),
    "encode": ("rollout.collector:encode_prompts",),
    "sample": ("rollout.pairs:stream_pairs",),
    "decode": ("flows.diffusers_flow:DiffusersFlow.decode",),
    "reward": ("reward.mix:RewardMix.__call__", "reward.scorer:score_images"),
    "statistics": ("rollout.pairs:image_statistics", "rollout.collector:RolloutCollector.weigh_scores"),
    "deal": (
        "rollout.collector:allocate_points",
        "rollout.collector:half_differences",
        "rollout.collector:normalize_difference",
        "rollout.points:PairPoints.record",
        "rollout.points:PairPoints.take",
    ),
    "train": (
        "module:FDFOModule.training_step",
        "lightning.pytorch.strategies:Strategy.backward",
        "lightning.pytorch.plugins:Precision.clip_gradients",
        "module:FDFOModule.optimizer_zero_grad",
        "torch.optim:AdamW.step",
    ),
    "other": ("lightning.pytorch.loops.optimization.automatic:Closure.closure",),
    "log": tuple(f"training.epoch_log:EpochLog.{method}" for method in ("add", "end_batch", "write")),
}  # fmt: skip
"""part -> names in modules of the package, or of another one; a name that is gone is an error. An optimiser's step
calls Lightning's closure, whose own time is not the optimiser's."""
HOOKS = {
    "UpdateGuard": "train",
    "FiniteWeights": "train",
    "LearningGuard": "log",
    "RolloutLog": "log",
    "EpochProgress": "log",
}
"""Callback -> the part of all its hooks; those of other callbacks are `write`."""
LIMIT = 0.03
COLUMNS = {
    "part": "part",
    "what": "what",
    "seconds": "s",
    "share": "share of the epoch",
    "limit": "limit",
    "within": "kept",
}


class Meter:
    """Seconds of each part in each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.beside: list[dict[str, float]] = []
        """of other threads than the main one"""
        self._stacks = threading.local()
        self._main = threading.get_ident()
        self._ended = False

    def next_epoch(self) -> None:
        """What comes now belongs to a new epoch."""
        self.epochs.append(defaultdict(float))
        self.beside.append(defaultdict(float))

    def end(self) -> None:
        """What comes now belongs to no epoch."""
        self._ended = True

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """While it is open, this thread's time belongs to a part; the part around it waits."""
        stack: list[list[Any]] = self._stacks.__dict__.setdefault("stack", [])
        now = time.perf_counter()
        if stack:
            self._add(stack[-1][0], now - stack[-1][1])
        stack.append([name, now])
        try:
            yield
        finally:
            now = time.perf_counter()
            self._add(name, now - stack.pop()[1])
            if stack:
                stack[-1][1] = now

    def _add(self, name: str, seconds: float) -> None:
        if self.epochs and not self._ended:
            kept = self.epochs if threading.get_ident() == self._main else self.beside
            kept[-1][name] += seconds

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time belongs to a part."""

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return timed


class Hooks(EpochClock):
    """Wraps the hooks of all other callbacks, and tells the meter where epochs begin."""

    meter = Meter()
    """of the run that is measured: the command line makes this callback, and has no other way to it"""
    last: Hooks

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        Hooks.last = self
        for callback in trainer.callbacks:
            if callback is not self:
                part = HOOKS.get(type(callback).__name__, "write")
                for hook in [each for each in dir(type(callback)) if each.startswith("on_")]:
                    if getattr(type(callback), hook) is not getattr(Callback, hook, None):
                        setattr(callback, hook, self.meter.wrap(part, getattr(callback, hook)))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.meter.next_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self.meter.end()


def find(name: str) -> tuple[Any, str]:
    """The owner and the attribute of `module:Class.method` or `module:function`, of this package by default."""
    module, _, path = name.partition(":")
    package = "" if module.startswith(("lightning.", "torch")) else "lightning_fdfo."
    *classes, attribute = path.split(".")
    return functools.reduce(getattr, classes, importlib.import_module(package + module)), attribute


@contextmanager
def wrapped(meter: Meter) -> Iterator[None]:
    """While it is open, everything of `WRAPPED` is timed."""
    from lightning_fdfo.rollout import collector

    deal = collector.deal_points

    def dealt(*arguments: Any) -> Iterator[Any]:
        batches = deal(*arguments)
        with suppress(StopIteration):
            while True:
                with meter.part("deal"):
                    batch = next(batches)
                yield batch

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Hooks, "meter", meter))
        stack.enter_context(mock.patch.object(collector, "deal_points", dealt))
        for part, names in WRAPPED.items():
            for owner, attribute in map(find, names):
                patch = mock.patch.object(owner, attribute, meter.wrap(part, getattr(owner, attribute)))
                stack.enter_context(patch)
        yield


def run(epochs: int, *words: str) -> tuple[Meter, list[float]]:
    """Trains the quick start without validation; returns the parts and the whole of each epoch."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder, wrapped(meter), mock.patch.object(sys, "argv", ["lightning-fdfo"]):
        command = [
            *("fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.default_root_dir", folder),
            *("--data.train", str(ROOT / "configs/prompts/digits_train.txt")),
            *("--data.val", str(ROOT / "configs/prompts/digits_heldout.txt"), "--trainer.num_sanity_val_steps=0"),
            *("--trainer.limit_val_batches=0", f"--trainer.max_epochs={epochs}"),
            *(f"--trainer.callbacks+={Hooks.__module__}.{Hooks.__name__}", *words),
        ]
        with quiet():
            main(command)
    del meter.epochs[0], meter.beside[0]  # as the clock does
    return meter, Hooks.last.seconds


def measure(quick: bool = False) -> Table:
    """A row for each part, and one for the epoch."""
    small = ("--model.batching.num_pairs=4", "--model.batching.batch_size=16", "--model.sampling.num_steps=2")
    meter, wholes = run(2, *small) if quick else run(11)
    epochs = [
        dict(parts) | {"other": whole - sum(parts[name] for name in PARTS[:-1])}
        for parts, whole in zip(meter.epochs, wholes, strict=True)
    ]
    rows = []
    for part in PARTS:
        share = median([parts.get(part, 0.0) / whole for parts, whole in zip(epochs, wholes, strict=True)])
        limit = LIMIT if part == "other" else None
        seconds = [parts.get(part, 0.0) for parts in epochs]
        row = {"part": part, "what": WHAT[part], "seconds": median(seconds), "share": share, "each": seconds}
        rows.append(row | ({"limit": limit, "within": within(share, limit)} if limit else {}))
    for part in sorted({part for beside in meter.beside for part in beside}):
        seconds = [beside.get(part, 0.0) for beside in meter.beside]
        row = {"part": f"({part})", "what": "in other threads meanwhile; not in the sum", "seconds": median(seconds)}
        rows.append(row | {"each": seconds})
    rows.append({"part": "epoch", "what": "", "seconds": median(wholes), "share": 1.0, "each": wholes})
    return Table("epoch_split", "The quick start's epoch", COLUMNS, rows, f"medians of {len(wholes)} epochs")
