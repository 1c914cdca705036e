"""The mixture: several rewards, scored side by side and weighed against each other.

    rewards:
      OCR: 1.0                                              # name: weight
      small: {reward: {class_path: JPEGSize, init_args: {sign: -1}}, weight: 0.1, scale: std}
      watched: {reward: my_package.my_module.redness, weight: 0}   # scored and logged, not trained on

Legend: N images, and in a rollout N = 2P, rows 2i and 2i+1 being pair i.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.objective import half_differences
from lightning_fdfo.reward import Metadata, Reward, Scorer, as_reward, describe, load_reward
from lightning_fdfo.running_std import RunningStd

Scale = float | Literal["none", "std"]


@dataclass(frozen=True)
class RewardTerm:
    """One reward of a mixture.

    Args:
        reward: a reward, or a plain function of images, prompts and metadata.
        weight: finite; 0 scores and logs without training on it.
        scale: what a score is divided by before it is weighed: `none` (1), a number > 0, or `std`, the running standard
            deviation of this reward's half differences over all pairs so far.
        device: where it runs; None takes the reward's own, else the flow's.
    """

    reward: Reward | Scorer
    weight: float = 1.0
    scale: Scale = "none"
    device: str | None = None


MAX_FAILURES = 3
"""Images in a row that may fail one by one before the rest of a batch counts as failed too."""


class RewardMix:
    """A weighted sum of rewards.

        total = sum_t weight_t * sign_t * score_t / scale_t        sign_t = 1 if higher is better, else -1

    Args:
        terms: name -> weight, or name -> `{reward: NAME or {class_path, init_args}, weight, scale, device}`, or (in
            Python) name -> RewardTerm. The short form's name is the reward's; the long form's is free, so that one
            class can come several times.

    Raises:
        ConfigurationError: nothing in it, an unknown key or reward, a weight, scale or device that makes no sense.

    Example:
        >>> mix = RewardMix({"JPEGSize": 1.0, "again": {"reward": "JPEGSize", "weight": 0}})
        >>> scores = mix(torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])
        >>> sorted(scores), bool((mix.total(scores) == scores["JPEGSize"]).all())
        (['JPEGSize', 'again'], True)
    """

    def __init__(self, terms: Mapping[str, Any]) -> None:
        if not terms:
            raise ConfigurationError("rewards: expected at least one, e.g. rewards: {OCR: 1.0}, got none")
        self.terms = {name: _parse_term(name, value) for name, value in terms.items()}
        self.rewards = {name: as_reward(term.reward) for name, term in self.terms.items()}
        self.running = {name: RunningStd() for name, term in self.terms.items() if term.scale == "std"}
        self._devices: dict[str, torch.device] = {}

    # Set-up

    def check(self, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError if a reward cannot score this prompt."""
        for name, reward in self.rewards.items():
            with _told(name, reward, "cannot check a prompt"):
                reward.check(prompt, metadata)

    def fetch(self) -> None:
        """Fetches all weights into the cache."""
        for name, reward in self.rewards.items():
            with _told(name, reward, "cannot fetch its weights"):
                reward.fetch()

    def setup(self, device: torch.device) -> None:
        """Sets up each reward on its own device, or on `device`.

        Raises:
            RewardError: one cannot be set up.
        """
        for name, reward in self.rewards.items():
            own = torch.device(self.terms[name].device or reward.device or device)
            self._devices[name] = device if own == torch.device(device.type) else own  # "cuda" is the flow's own
            with _told(name, reward, f"cannot be set up on {self._devices[name]}"):
                reward.setup(self._devices[name])

    # Scores

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], drop: bool = False
    ) -> dict[str, Tensor]:
        """Scores a batch.

        Terms on the images' device run here, one after the other; the others meanwhile in a pool of threads, of which
        each device has one, and each term on the CPU one of its own.

        Args:
            images: [N, 3, H, W], float32 in [0, 1].
            prompts: N strings.
            metadata: N mappings.
            drop: whether a failure is told by a warning, and marked by NaN.

        Returns:
            name -> [N], float32, on the CPU: each reward's own scores, unweighted.

        Raises:
            RewardError: a reward raised something, or gave another shape, or a number that is not finite. A failure is
                never a score. It names the prompt, and `row` says which it is, if the image by itself fails too.
        """
        here, elsewhere = self._by_thread(images.device)

        def score(names: Sequence[str]) -> dict[str, Tensor]:
            return {name: self._score(name, images, prompts, metadata, drop) for name in names}

        if not elsewhere:
            return score(here)
        with ThreadPoolExecutor(len(elsewhere)) as pool:
            pending = [pool.submit(score, names) for names in elsewhere]
            scores = score(here)
            for future in pending:
                scores |= future.result()
        return {name: scores[name] for name in self.terms}

    def _by_thread(self, device: torch.device) -> tuple[list[str], list[list[str]]]:
        """Names of the terms that run on the images' device, and those of each other thread."""
        here: list[str] = []
        elsewhere: dict[object, list[str]] = {}
        for name in self.terms:
            own = self._devices.get(name, device)
            if own == device:
                here.append(name)
            else:
                elsewhere.setdefault(name if own.type == "cpu" else own, []).append(name)
        return here, list(elsewhere.values())

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

    # The sum

    def update_scales(self, epoch: int, scores: Mapping[str, Tensor], all_sum: Callable[[Tensor], Tensor]) -> None:
        """Adds an epoch's pairs to the running deviations.

        Args:
            epoch: the current one.
            scores: name -> [2P] of this device's pairs.
            all_sum: sums a tensor over devices; the identity on one.
        """
        for name, running in self.running.items():
            running.update(epoch, half_differences(scores[name]), all_sum)

    @property
    def scales_known(self) -> bool:
        """Whether scores can be weighed: False before the first rollout, if a weighted term's scale is `std`."""
        return all(running.std is not None for name, running in self.running.items() if self.terms[name].weight)

    def factor(self, name: str) -> float:
        """Weight * sign / scale of a term; raises ValueError while its scale is not known."""
        term = self.terms[name]
        if term.weight == 0:
            return 0.0
        scale = self.running[name].std if name in self.running else term.scale
        if scale is None:
            raise ValueError(f"the scale of reward {name!r} is not known yet: call update_scales first")
        return term.weight * self._sign(name) / (1.0 if scale == "none" else float(scale))

    def _sign(self, name: str) -> float:
        return 1.0 if self.rewards[name].higher_is_better else -1.0

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of scores, [N]; raises ValueError while a scale is not known."""
        return torch.stack([self.factor(name) * scores[name] for name in self.terms]).sum(dim=0)

    def differences(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each term adds to the half differences of the total.

            difference_t = weight_t * sign_t / scale_t * half_differences(score_t)

        Args:
            scores: name -> [2P].

        Returns:
            name -> [2P]; their sum is what trains.

        Raises:
            ValueError: a scale is not known yet.
        """
        return {name: self.factor(name) * half_differences(scores[name]) for name in self.terms}

    def preference(self, name: str, scores: Mapping[str, Tensor]) -> Tensor:
        """Which branch of its pair a term finds better: [2P], 1 for this one, -1 for its partner, 0 for a tie."""
        return self._sign(name) * half_differences(scores[name]).sign()

    # State: the running deviations

    def state_dict(self) -> dict[str, Any]:
        """Running deviations, by name."""
        return {name: running.state_dict() for name, running in self.running.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the deviations of terms of the same name; a new term starts its own."""
        for name, running in self.running.items():
            if name in state:
                running.load_state_dict(state[name])


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


_KEYS = {"reward", "weight", "scale", "device"}


def _parse_term(name: str, value: Any) -> RewardTerm:
    """One entry of a mixture, short form or long."""
    expected = f"rewards.{name}: expected a weight or {{reward: NAME or {{class_path, init_args}}, weight: NUMBER}}"
    if isinstance(value, RewardTerm):
        return _checked(value, expected)
    if _is_number(value):
        return RewardTerm(load_reward(name), float(value))
    if not isinstance(value, Mapping) or "reward" not in value or set(value) - _KEYS:
        raise ConfigurationError(f"{expected}, and maybe scale and device, got {value!r}")
    reward = value["reward"]
    if isinstance(reward, str):
        reward = load_reward(reward)
    elif isinstance(reward, Mapping):
        class_path, init_args = reward.get("class_path"), reward.get("init_args") or {}
        known = not set(reward) - {"class_path", "init_args"}
        if not known or not isinstance(class_path, str) or not isinstance(init_args, Mapping):
            raise ConfigurationError(f"{expected}, got reward {dict(reward)!r}")
        reward = load_reward(class_path, **init_args)
    elif not callable(reward):
        raise ConfigurationError(f"{expected}, got reward {reward!r}")
    term = RewardTerm(reward, value.get("weight", 1.0), value.get("scale", "none"), value.get("device"))
    return _checked(term, expected)


def _checked(term: RewardTerm, expected: str) -> RewardTerm:
    """The term, its numbers as floats; raises ConfigurationError for what makes no sense."""
    if not _is_number(term.weight):
        raise ConfigurationError(f"{expected}, got weight {term.weight!r}")
    if term.scale not in ("none", "std") and not (_is_number(term.scale) and float(term.scale) > 0):
        raise ConfigurationError(f"{expected}, with scale none, std or a number above 0, got scale {term.scale!r}")
    try:
        torch.device(term.device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(f"{expected}, with a device like cpu or cuda:1, got {term.device!r}") from error
    scale = term.scale if term.scale in ("none", "std") else float(term.scale)
    return replace(term, weight=float(term.weight), scale=scale)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
