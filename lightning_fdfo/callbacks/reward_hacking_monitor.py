"""RewardHackingMonitor: a watch on numbers that must not move while the reward rises."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_fdfo.checkpoints.run_folder import run_folder
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.files import write_text
from lightning_fdfo.image_statistics import STATISTICS

Range = tuple[float | None, float | None]


@dataclass(frozen=True)
class Band:
    """Where a number may lie: lowest and highest, null for no bound. Exactly one of the three is given.

    Args:
        value: of the number itself.
        change: of its difference to its value in epoch 0.
        times: of its quotient by its value in epoch 0.

    Example:
        >>> band = Band(times=(0.5, 2.0))
        >>> band.measure(0.9, start=0.3), band.holds(0.9, start=0.3), band.holds(0.5, start=0.3)
        (3.0, False, True)
    """

    value: Range | None = None
    change: Range | None = None
    times: Range | None = None

    def check(self, name: str) -> None:
        """Raises ConfigurationError unless one range is given, and something can lie in it."""
        given = [pair for pair in (self.value, self.change, self.times) if pair is not None]
        low, high = given[0] if len(given) == 1 else (None, None)
        finite = all(bound is None or math.isfinite(bound) for bound in (low, high))
        if not finite or (low is None and high is None) or (low is not None and high is not None and low >= high):
            raise ConfigurationError(
                f"RewardHackingMonitor: {name}: expected one of value, change and times as [lowest, highest], finite, "
                f"null for no bound, e.g. {{times: [0.5, 2.0]}}, got {asdict(self)}"
            )

    @property
    def kind(self) -> str:
        """Which of the three is given."""
        return next(kind for kind, pair in asdict(self).items() if pair is not None)

    @property
    def range(self) -> Range:
        """Lowest and highest."""
        return self.value or self.change or self.times or (None, None)

    def measure(self, number: float, start: float) -> float:
        """What must lie in the range: the number, its change, or its quotient."""
        if self.value is not None:
            return number
        if self.change is not None:
            return number - start
        return number / start if start else (1.0 if number == start else float("inf"))

    def holds(self, number: float, start: float) -> bool:
        """Whether the number lies in its band; NaN does not."""
        low, high = self.range
        seen = self.measure(number, start)
        return (low is None or seen >= low) and (high is None or seen <= high) and seen == seen


class RewardHackingMonitor(Callback):
    """Warns, or stops the run, when a logged number leaves its band, and names the epoch to go back to.

    A reward is a measure, and what trains on a measure finds its gaps: blank backgrounds, grids, blur, loud colours. So
    watch what was not asked for: `image/brightness`, `image/color_entropy`, `image/edge_density`,
    `image/high_frequency_share`, `image/saturation`, `train/drift` (how far the velocity has left the base model's),
    and `reward/NAME/mean` of rewards with weight 0.

    An epoch's images are painted by the weights that the epoch before has left. So if they leave a band in epoch e, the
    last good images are those of e - 1, and the weights that painted them those of epoch e - 2's checkpoint.

    `reward_hacking.json` in the run's folder holds the values of epoch 0, and each epoch that was out of a band.

    Args:
        bands: name of a logged number -> its band.
        action: `warn`, or `stop`: at the end of the epoch.

    Raises:
        ConfigurationError: no band, one that makes no sense, or one for a number that is not logged.

    Example:
        >>> monitor = RewardHackingMonitor({"image/saturation": Band(times=(0.5, 2.0))}, action="stop")
    """

    def __init__(self, bands: dict[str, Band], action: Literal["warn", "stop"] = "warn") -> None:
        self.bands = bands
        self.action = action
        self.start: dict[str, float] = {}
        self.events: list[dict[str, Any]] = []
        self.good = -1
        """The last epoch all of whose numbers were in their bands."""
        if not bands:
            raise ConfigurationError("RewardHackingMonitor: expected bands, e.g. {image/saturation: {times: [0.5, 2]}}")
        for name, band in bands.items():
            band.check(name)

    def state_dict(self) -> dict[str, Any]:
        """Epoch 0's values, and what has happened since."""
        return {"start": self.start, "events": self.events, "good": self.good}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with them."""
        self.start, self.events, self.good = state_dict["start"], state_dict["events"], state_dict["good"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ConfigurationError for a statistic or a reward that there is not."""
        known = {f"image/{name}" for name in STATISTICS}
        terms = getattr(getattr(pl_module, "rewards", None), "terms", {})
        for name in self.bands:
            term = re.fullmatch(r"reward/([^/]+)/.*", name)
            if (name.startswith("image/") and name not in known) or (term and term[1] not in terms):
                raise ConfigurationError(
                    f"RewardHackingMonitor: nothing logs {name}; there are {', '.join(sorted(known))}, train/drift, "
                    f"and reward/NAME/mean of the rewards {', '.join(terms)}"
                )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the epoch's numbers with their bands."""
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        missing = sorted(set(self.bands) - set(metrics))
        if missing:
            raise ConfigurationError(
                f"RewardHackingMonitor: {missing} was not logged in epoch {trainer.current_epoch}; "
                f"logged: {', '.join(sorted(metrics))}"
            )
        self.start = self.start or {name: metrics[name] for name in self.bands}
        left = [name for name, band in self.bands.items() if not band.holds(metrics[name], self.start[name])]
        if not left:
            self.good = trainer.current_epoch
        for name in left:
            band = self.bands[name]
            event = {"epoch": trainer.current_epoch, "number": name, "value": metrics[name], "start": self.start[name]}
            event |= {"kind": band.kind, "lowest": band.range[0], "highest": band.range[1]}
            self.events.append(event | {"last_good_checkpoint": self.good - 1})
        if left:
            rank_zero_warn(self._told(trainer, left, metrics))
            trainer.should_stop = trainer.should_stop or self.action == "stop"
        if trainer.is_global_zero:
            record = {"start": self.start, "events": self.events}
            write_text(run_folder(trainer) / "reward_hacking.json", json.dumps(record, indent=2) + "\n")

    def _told(self, trainer: Trainer, left: list[str], metrics: dict[str, float]) -> str:
        said = []
        for name in left:
            band = self.bands[name]
            low, high = band.range
            said.append(
                f"{name} is {metrics[name]:.4g} ({self.start[name]:.4g} in epoch 0), {band.kind} "
                f"{band.measure(metrics[name], self.start[name]):.3g}, band {low} to {high}"
            )
        stops = "the run stops" if self.action == "stop" else "look at the pictures"
        return f"epoch {trainer.current_epoch}: {'; '.join(said)}: {stops}, and {self._cure(trainer)}"

    def _cure(self, trainer: Trainer) -> str:
        epoch = self.good - 1
        if epoch < 0:
            return "no checkpoint is from before: start anew with other rewards or weights"
        found = {}
        for callback in trainer.checkpoint_callbacks:
            for file in Path(getattr(callback, "dirpath", None) or ".").glob("*.ckpt"):
                number = re.search(r"epoch=(\d+)", file.name)
                if number and int(number[1]) <= epoch:
                    found[int(number[1])] = file
        if not found or max(found) < epoch:
            again = f"the same run with --trainer.max_epochs {epoch + 1} ends there"
            return f"go back to epoch {epoch}: {again}" + (f", and {found[max(found)]} was kept" if found else "")
        return f"go back to epoch {epoch}: {found[epoch]}"
