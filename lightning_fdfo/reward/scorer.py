"""Several rewards that score the same images side by side: each on its device, in threads; a failure is never a score.

Legend: N images.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_fdfo.errors import RewardError, StoppedError
from lightning_fdfo.files import is_first_process
from lightning_fdfo.reward.base import BaseReward, Metadata
from lightning_fdfo.reward.call import (
    check_device,
    check_prompt,
    guarded,
    image_gradient,
    images_per_score,
    overdue,
    score_images,
)
from lightning_fdfo.reward.origin import describe
from lightning_fdfo.reward.routing import Route
from lightning_fdfo.reward.scores import Scores
from lightning_fdfo.reward.waiting import OverdueError, TimeLimit, start

MAX_FAILURES = 3
"""Images in a row that may fail one by one before the rest of a batch counts as failed too."""


class _OverdueRewardError(RewardError):
    """A reward did not end in time; it may still be running."""


class Scoring:
    """A batch that is being scored.

    Args:
        names: of the rewards, in their order.
        pending: what threads give: some of their scores, by name.
    """

    def __init__(self, names: Sequence[str], pending: Sequence[Future[dict[str, Scores]]]) -> None:
        self._names = names
        self._pending = pending
        self._scores: dict[str, Scores] = {}

    def add(self, scores: Mapping[str, Scores]) -> None:
        """Adds scores that are there."""
        self._scores.update(scores)

    def result(self) -> dict[str, Scores]:
        """Waits for all scores, by name; raises what a reward raised, once no other still runs."""
        wait(self._pending)
        for future in self._pending:
            self._scores |= future.result()
        return {name: self._scores[name] for name in self._names}

    @contextmanager
    def ended_on_error(self) -> Iterator[None]:
        """An error within it, or a stop that was asked for, waits until no reward still runs; ctrl-C does not.

        A thread that is still in a reward's code when the process ends could abort it, with another exit code.
        """
        try:
            yield
        except (Exception, StoppedError):
            wait(self._pending)
            raise


class RewardScorer:
    """Scores images by several rewards.

    Args:
        rewards: name -> reward.
        devices: name -> where it runs; None takes the reward's own, else that of `setup`.
        time_limits: name -> seconds for scoring a batch; None, or not named: no limit.
    """

    def __init__(
        self,
        rewards: Mapping[str, BaseReward],
        devices: Mapping[str, str | None],
        time_limits: Mapping[str, float | None] | None = None,
    ) -> None:
        self.rewards = rewards
        self.devices = devices
        self._limits = {name: TimeLimit(limit) for name, limit in (time_limits or {}).items() if limit is not None}
        self._devices: dict[str, torch.device] = {}
        self._prompts: dict[str, dict[str, None]] = {name: {} for name in rewards}  # different ones, in their order

    def check(self, name: str, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError if a reward cannot score this prompt."""
        check_prompt(name, self.rewards[name], prompt, metadata)
        self._prompts[name][prompt] = None

    def fetch(self) -> None:
        """Fetches all weights into the cache; raises ConfigurationError for a device that is not here."""
        for name, reward in self.rewards.items():
            if own := self.devices[name] or reward.device:
                check_device(name, own)
            with guarded(name, reward, "cannot fetch its weights", "it fetches its weights"):
                reward.fetch()

    def setup(self, device: torch.device) -> None:
        """Sets up each reward on its own device, or on `device`; raises RewardError if one cannot be."""
        for name, reward in self.rewards.items():
            own = torch.device(self.devices[name] or reward.device or device)
            self._devices[name] = device if own == torch.device(device.type) else own  # "cuda" is the flow's own
            where = f"set up on {self._devices[name]}"
            with guarded(name, reward, f"cannot be {where}", f"it is being {where}"):
                reward.setup(self._devices[name])
            self._warn_of_truncated(name, reward)

    def _warn_of_truncated(self, name: str, reward: BaseReward) -> None:
        """One warning, if a reward reads only the beginning of some of the prompts that were checked for it."""
        prompts = list(self._prompts[name])
        self._prompts[name].clear()
        with guarded(name, reward, "cannot count the tokens of prompts", "it counts the tokens of prompts"):
            count = reward.count_truncated(prompts) if prompts else 0
        if count and is_first_process():
            warnings.warn(
                f"reward {name!r} ({describe(reward)}): {count} of {len(prompts)} different prompts are longer than it "
                f"reads, and their ends do not count in its scores ({reward.needs or 'shorten them'})",
                stacklevel=2,
            )

    def start_epoch(self, epoch: int, pairs: Sequence[int], num_pairs: int, folder: Path) -> None:
        """Tells each reward, see `BaseReward.start_epoch`."""
        for name, reward in self.rewards.items():
            with guarded(name, reward, "cannot start an epoch", "it starts an epoch"):
                reward.start_epoch(epoch, pairs, num_pairs, folder)

    def start(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        routes: Mapping[str, Route],
        *,
        drop: bool,
    ) -> Scoring:
        """Starts to score a batch; see `RewardMix.start`.

        Args:
            images: [N, 3, H, W].
            prompts: N strings.
            metadata: N mappings.
            routes: name -> which of the images it scores; who is not in it is not asked.
            drop: whether a failure is reported by a warning, and leaves the image without a score.
        """
        here, elsewhere = self._by_thread(images.device, routes)

        def score(names: Sequence[str]) -> dict[str, Scores]:
            return {name: self._score_routed(name, images, prompts, metadata, routes[name], drop) for name in names}

        scoring = Scoring(
            [name for name in self.rewards if name in routes], [start(partial(score, names)) for names in elsewhere]
        )
        with scoring.ended_on_error():
            scoring.add(score(here))
        return scoring

    def image_gradient(self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The gradient of one reward's scores at the images: [N, 3, H, W]."""
        device = self._devices.get(name, images.device)
        return image_gradient(name, self.rewards[name], device, images, prompts, metadata)

    def _by_thread(self, device: torch.device, names: Collection[str]) -> tuple[list[str], list[list[str]]]:
        """Those of some rewards that run on the images' device, and those of each other thread."""
        here: list[str] = []
        elsewhere: dict[object, list[str]] = {}
        for name in (name for name in self.rewards if name in names):
            own = self._devices.get(name, device)
            if own == device:
                here.append(name)
            else:
                elsewhere.setdefault(name if own.type == "cpu" else own, []).append(name)
        return here, list(elsewhere.values())

    def _score_routed(
        self,
        name: str,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        route: Route,
        drop: bool,
    ) -> Scores:
        """One reward's scores of the images that are routed to it."""
        values, scored = torch.zeros(len(images), dtype=torch.float64), torch.zeros(len(images), dtype=torch.bool)
        rows = route.routed.nonzero().flatten().tolist()
        if rows:
            own = images if len(rows) == len(images) else images[rows]
            try:
                values[rows], scored[rows] = self._score(
                    name, own, [prompts[row] for row in rows], [metadata[row] for row in rows], drop
                )
            except RewardError as error:
                error.row = None if error.row is None else rows[error.row]
                raise
        return Scores(values, scored, *route)

    def _score(
        self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], drop: bool
    ) -> tuple[Tensor, Tensor]:
        """One reward's scores, and which there are; a batch that fails goes one by one, to know which image it is.

        A `PairReward` is asked pair by pair instead.
        """
        count, each = len(images), images_per_score(self.rewards[name])
        try:
            found = self._score_batch(name, images, prompts, metadata)
        except _OverdueRewardError as error:  # it may still be running: it is not asked again for each image
            if not drop:
                raise
            warnings.warn(f"dropped, with their pairs: {count} images: {error}", stacklevel=2)
            return torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
        except RewardError as error:
            failed = error
        else:
            return self._compared(name, found, prompts, drop)
        values, scored, failures = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool), 0
        for row in range(0, count, each):
            one, prompt = slice(row, row + each), prompts[row]
            try:
                if failures == MAX_FAILURES:
                    raise failed
                found = self._score_batch(name, images[one], prompts[one], metadata[one])
                (values[one], scored[one]), failures = self._compared(name, found, prompts[one], drop), 0
            except RewardError as error:
                failures += failures < MAX_FAILURES
                if not drop:
                    located = RewardError(f"prompt {prompt!r}: {failed}")
                    located.row = row
                    raise located from error
                warnings.warn(f"dropped, with its pair: prompt {prompt!r}: {error}", stacklevel=2)
        if not drop:
            raise failed
        return values, scored

    def _compared(self, name: str, values: Tensor, prompts: Sequence[str], drop: bool) -> tuple[Tensor, Tensor]:
        """Scores, and which there are: a `PairReward` gives NaN for a pair that it has not compared."""
        missing = values.isnan()
        if not bool(missing.any()):
            return values, ~missing
        row = int(missing.nonzero()[0])
        said = f"no preference on {int(missing.sum()) // 2} of {len(values) // 2} pairs, first for {prompts[row]!r}"
        if not drop:
            error = RewardError(f"reward {name!r}: {said}: `failures.on_reward_error: drop_pair` leaves them out")
            error.row = row
            raise error
        warnings.warn(f"dropped: reward {name!r} has {said}", stacklevel=2)
        return values.nan_to_num(nan=0.0), ~missing

    def _score_batch(self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """One reward's scores, within its time limit."""
        reward, device = self.rewards[name], self._devices.get(name, images.device)
        call = partial(score_images, name, reward, device, images, prompts, metadata)
        limit = self._limits.get(name)
        if limit is None:
            return call()
        try:
            return limit(call)
        except OverdueError as error:
            raise _OverdueRewardError(*overdue(name, reward, len(images), limit.seconds, str(error)).args) from error
