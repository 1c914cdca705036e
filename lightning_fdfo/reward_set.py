"""Several rewards that score the same images side by side: each on its device, in threads; a failure is never a score.

Legend: N images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.reward import Metadata, Reward, describe

MAX_FAILURES = 3
"""Images in a row that may fail one by one before the rest of a batch counts as failed too."""


class RewardSet:
    """Rewards by name.

    Args:
        rewards: name -> reward.
        devices: name -> where it runs; None takes the reward's own, else that of `setup`.
    """

    def __init__(self, rewards: Mapping[str, Reward], devices: Mapping[str, str | None]) -> None:
        self.rewards = rewards
        self.devices = devices
        self._devices: dict[str, torch.device] = {}

    def check(self, name: str, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError if a reward cannot score this prompt."""
        with _told(name, self.rewards[name], "cannot check a prompt"):
            self.rewards[name].check(prompt, metadata)

    def fetch(self) -> None:
        """Fetches all weights into the cache."""
        for name, reward in self.rewards.items():
            with _told(name, reward, "cannot fetch its weights"):
                reward.fetch()

    def setup(self, device: torch.device) -> None:
        """Sets up each reward on its own device, or on `device`; raises RewardError if one cannot be."""
        for name, reward in self.rewards.items():
            own = torch.device(self.devices[name] or reward.device or device)
            self._devices[name] = device if own == torch.device(device.type) else own  # "cuda" is the flow's own
            with _told(name, reward, f"cannot be set up on {self._devices[name]}"):
                reward.setup(self._devices[name])

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        drop: bool,
        rows: Mapping[str, Sequence[int]],
    ) -> dict[str, Tensor]:
        """Scores a batch; see `RewardMix.__call__`.

        Args:
            images: [N, 3, H, W].
            prompts: N strings.
            metadata: N mappings.
            drop: whether a failure is told by a warning, and marked by NaN.
            rows: name -> those that it scores; the others are NaN.
        """
        here, elsewhere = self._by_thread(images.device)

        def score(names: Sequence[str]) -> dict[str, Tensor]:
            return {name: self._score_rows(name, images, prompts, metadata, drop, rows[name]) for name in names}

        if not elsewhere:
            return score(here)
        with ThreadPoolExecutor(len(elsewhere)) as pool:
            pending = [pool.submit(score, names) for names in elsewhere]
            scores = score(here)
            for future in pending:
                scores |= future.result()
        return {name: scores[name] for name in self.rewards}

    def _by_thread(self, device: torch.device) -> tuple[list[str], list[list[str]]]:
        """Names of the rewards that run on the images' device, and those of each other thread."""
        here: list[str] = []
        elsewhere: dict[object, list[str]] = {}
        for name in self.rewards:
            own = self._devices.get(name, device)
            if own == device:
                here.append(name)
            else:
                elsewhere.setdefault(name if own.type == "cpu" else own, []).append(name)
        return here, list(elsewhere.values())

    def _score_rows(
        self,
        name: str,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        drop: bool,
        rows: Sequence[int],
    ) -> Tensor:
        """One reward's scores of some rows of the batch; NaN for the others."""
        if len(rows) == len(images):
            return self._score(name, images, prompts, metadata, drop)
        scores = torch.full((len(images),), torch.nan)
        if rows:
            chosen = list(rows)
            try:
                scores[chosen] = self._score(
                    name, images[chosen], [prompts[row] for row in rows], [metadata[row] for row in rows], drop
                )
            except RewardError as error:
                error.row = None if error.row is None else rows[error.row]
                raise
        return scores

    def _score(
        self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], drop: bool
    ) -> Tensor:
        """One reward's scores; those of a batch that fails one by one, to know which image it is."""
        try:
            return self._score_batch(name, images, prompts, metadata)
        except RewardError as error:
            failed = error
        scores, failures = [], 0
        for row, (prompt, facts) in enumerate(zip(prompts, metadata, strict=True)):
            try:
                if failures == MAX_FAILURES:
                    raise failed
                scores.append(self._score_batch(name, images[row : row + 1], [prompt], [facts]))
                failures = 0
            except RewardError as error:
                failures += failures < MAX_FAILURES
                if not drop:
                    located = RewardError(f"prompt {prompt!r}: {failed}")
                    located.row = row
                    raise located from error
                warnings.warn(f"dropped, with its pair: prompt {prompt!r}: {error}", stacklevel=2)
                scores.append(torch.tensor([torch.nan]))
        if not drop:
            raise failed
        return torch.cat(scores)

    @torch.no_grad()  # here, because a thread has a grad mode of its own
    def _score_batch(self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """One reward's scores, held to the contract."""
        reward = self.rewards[name]
        images = images.to(self._devices.get(name, images.device))
        with (
            _told(name, reward, f"failed on images on {images.device}"),
            torch.autocast(images.device.type, enabled=False),  # a score's digits are not the trainer's to cut
        ):
            score = torch.as_tensor(reward(images, prompts, metadata)).detach().float().cpu()
        if score.shape != (len(images),):
            raise _failure(name, reward, f"expected [{len(images)}] scores, got shape {list(score.shape)}")
        if not bool(score.isfinite().all()):
            row = int((~score.isfinite()).nonzero()[0])
            raise _failure(name, reward, f"score {score[row].item()} for prompt {prompts[row]!r}")
        return score


@contextmanager
def _told(name: str, reward: Reward, what: str) -> Iterator[None]:
    """Turns whatever foreign code raises into a RewardError with its name; what the user can mend passes."""
    try:
        yield
    except (ConfigurationError, RewardError):
        raise
    except Exception as error:
        raise _failure(name, reward, f"{what}: {error!r}") from error


def _failure(name: str, reward: Reward, what: str) -> RewardError:
    """Names the reward, its distribution, what happened, and the cure."""
    cure = f"`lightning-fdfo rewards check {reward.name}` shows what a reward must do"
    return RewardError(f"reward {name!r} ({describe(reward)}): {what}; {cure}")
