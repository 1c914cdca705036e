"""The mixture: several rewards, scored side by side, then weighted and summed.

    rewards:
      OCR: 1.0                                              # name: weight
      small: {reward: {class_path: JPEGSize, init_args: {sign: -1}}, weight: 0.1, scale: std}
      watched: {reward: my_package.my_module.redness, weight: 0}   # scored and logged, not trained on

A term is in reward/term.py, scoring in reward/scorer.py, which prompts a term is for in reward/routing.py.
Legend: N images, and in a rollout N = 2P, rows 2i and 2i+1 being pair i.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.base import Metadata, PairReward
from lightning_fdfo.reward.function import as_reward
from lightning_fdfo.reward.routing import Route
from lightning_fdfo.reward.running_std import RunningStd
from lightning_fdfo.reward.scorer import RewardScorer, Scoring
from lightning_fdfo.reward.scores import HalfDifferences, Scores
from lightning_fdfo.reward.term import parse_terms


class RewardMix:
    """A weighted sum of rewards for an image, and of their half differences for a pair.

        total      = sum_t weight_t * route_t * sign_t * score_t / scale_t
        difference = sum_t weight_t * route_t * gate_t * clip(sign_t * half_difference_t / scale_t, -c_t, c_t)

        sign_t = 1 if higher is better, else -1;  route_t: of the prompt;  gate_t: 1 if both branches pass, else 0

    `difference` is what trains. A pair's loss grows in proportion to its size (loss(c * r) = c * loss(r) for c >= 0),
    so without `clip` one pair with a freak score can outweigh all others of an epoch. The bound c_t is applied after
    the scale, so that it is in the scale's unit (with `std`, deviations), and before the weight, so that the weight
    still says how much a term can do. Clip is odd, and weight, route and gate belong to the pair: the two branches'
    differences stay opposite.

    A term with `gradient: true` adds nothing to `difference`: it adds the gradient of its score, see `pulls`.

    Args:
        terms: name -> weight, or name -> `{reward: NAME or {class_path, init_args}, weight, scale, clip, gate,
            device, time_limit, gradient}`, or (in Python) name -> RewardTerm. The short form's name is the reward's;
            the long form's is free, so that one class can come several times.

    Raises:
        ConfigurationError: nothing in it, an unknown key or reward, a value that makes no sense.

    Example:
        >>> mix = RewardMix({"JPEGSize": 1.0, "again": {"reward": "JPEGSize", "weight": 0}})
        >>> scores = mix(torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])
        >>> sorted(scores), bool((mix.total(scores).values == scores["JPEGSize"].values).all())
        (['JPEGSize', 'again'], True)
    """

    def __init__(self, terms: Mapping[str, Any]) -> None:
        self.terms = parse_terms(terms)
        self.rewards = {name: as_reward(term.reward) for name, term in self.terms.items()}
        self.running = {name: RunningStd() for name, term in self.terms.items() if term.scale == "std"}
        self.scorer = RewardScorer(
            self.rewards,
            {name: term.device for name, term in self.terms.items()},
            {name: term.time_limit for name, term in self.terms.items()},
        )

    @property
    def pair_terms(self) -> list[str]:
        """Names of the terms that compare two images: a score is that of an image beside the other."""
        return [name for name, reward in self.rewards.items() if isinstance(reward, PairReward)]

    # Set-up

    def check(self, prompt: str, metadata: Metadata, names: Collection[str] | None = None) -> None:
        """Checks that a prompt can be scored.

        Args:
            prompt: its text.
            metadata: its metadata.
            names: terms that it goes to; None for all.

        Raises:
            ConfigurationError: one of them cannot score it, or has a gate on a term that does not.
        """
        for name in self.terms if names is None else names:
            gate = self.terms[name].gate
            if gate is not None and names is not None and gate.reward not in names:
                raise ConfigurationError(
                    f"reward {name!r} has a gate on {gate.reward!r}, which does not score this prompt: add "
                    f"{gate.reward!r} to the prompt's rewards, with 0 if it is not to train"
                )
            self.scorer.check(name, prompt, metadata)

    def fetch(self) -> None:
        """Fetches all weights into the cache."""
        self.scorer.fetch()

    def setup(self, device: torch.device) -> None:
        """Sets up each reward on its own device, or on `device`; raises RewardError if one cannot be."""
        self.scorer.setup(device)

    # Scores

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        *,
        routes: Mapping[str, Route] | None = None,
        drop: bool = False,
    ) -> dict[str, Scores]:
        """Scores a batch, and waits: see `start`."""
        return self.start(images, prompts, metadata, routes=routes, drop=drop).result()

    def start(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        *,
        routes: Mapping[str, Route] | None = None,
        drop: bool = False,
    ) -> Scoring:
        """Starts to score a batch.

        Terms on the images' device run now, one by one. The others run meanwhile, and go on after this has returned,
        in threads, of which each device has one, and each term on the CPU one of its own. A reward need not stand two
        calls at a time: the next batch is not to start before this one's `result`.

        Args:
            images: [N, 3, H, W], float32 in [0, 1]; not to be changed before all scores are there.
            prompts: N strings.
            metadata: N mappings.
            routes: name -> which images a term sees; without one it is left out. None: all to all.
            drop: whether a failure is reported by a warning, and leaves the image without a score.

        Returns:
            A Scoring, whose `result` is: name -> each reward's own scores, unweighted, on the CPU.

        Raises:
            RewardError: here or in `result`: a reward raised something, took longer than its time limit, or gave
                something else than finite real numbers of the right shape. A failure is never a score. It names the
                prompt, and `row` says which it is, if the image by itself fails too.

        Example:
            >>> scoring = RewardMix({"JPEGSize": 1.0}).start(torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])
            >>> list(scoring.result())
            ['JPEGSize']
        """
        if routes is None:
            routes = dict.fromkeys(self.terms, Route.everywhere(len(images)))
        return self.scorer.start(images, prompts, metadata, routes, drop=drop)

    # The sum

    def update_scales(self, epoch: int, differences: Mapping[str, HalfDifferences]) -> None:
        """Adds an epoch's pairs to the running deviations.

        Args:
            epoch: the current one.
            differences: name -> half differences of its scores, of all devices.
        """
        for name, running in self.running.items():
            values, compared = differences[name]
            running.update(epoch, values[compared])

    @property
    def scales_known(self) -> bool:
        """Whether scores can be weighted: not before each weighted term with scale `std` has scored a pair."""
        return all(running.std is not None for name, running in self.running.items() if not self.terms[name].is_watched)

    def factor(self, name: str, epoch: int = 0) -> float:
        """Weight * sign / scale of a term in an epoch; raises ValueError while its scale is not known."""
        weight, scale = self.terms[name].weight_at(epoch), self.terms[name].scale
        if weight == 0:
            return 0.0
        divisor = self.running[name].std if scale == "std" else scale
        if divisor is None:
            raise ValueError(f"the scale of reward {name!r} is not known yet: call update_scales first")
        return weight * self._sign(name) / (1.0 if divisor == "none" else float(divisor))

    def _sign(self, name: str) -> float:
        return 1.0 if self.rewards[name].higher_is_better else -1.0

    def total(self, scores: Mapping[str, Scores], epoch: int = 0) -> Scores:
        """The weighted sum of scores, float32; clip and gate are matters of pairs, and have no part in it.

        An image has a total unless a term has failed on it.

        Args:
            scores: name -> scores of N images.
            epoch: whose weights.

        Raises:
            ValueError: a scale is not known yet.
        """
        weighted = [self._weigh(name, one.values.float(), one.scored, one, epoch) for name, one in scores.items()]
        failed = torch.stack([one.failed for one in scores.values()]).any(dim=0)
        total = torch.where(failed, 0.0, torch.stack(weighted).sum(dim=0))
        return Scores.of(total)._replace(scored=~failed)

    def contributions(
        self, scores: Mapping[str, Scores], differences: Mapping[str, HalfDifferences], epoch: int = 0
    ) -> dict[str, Tensor]:
        """What each term adds to the half differences of the total, as the formula above has it.

        Args:
            scores: name -> scores of 2P images.
            differences: name -> half differences of its scores, see `scores.compare`.
            epoch: whose weights.

        Returns:
            name -> [2P], 0 where the pair is not compared; their sum is what trains. The rows of a pair are opposite.

        Raises:
            ValueError: a scale is not known yet.
        """
        added = {}
        for name, term in self.terms.items():
            values, compared = differences[name]
            if term.gradient:
                added[name] = torch.zeros(len(values))
                continue
            weighted = self._weigh(name, values, compared, scores[name], epoch, term.clip)
            added[name] = torch.where(self.passes(name, scores), weighted, 0.0)
        return added

    def gradient_terms(self, epoch: int = 0) -> list[str]:
        """Names of the terms that train by their gradient in an epoch."""
        return [name for name, term in self.terms.items() if term.gradient and term.weight_at(epoch)]

    def image_gradient(self, name: str, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The gradient of a term's scores at the images, in the reward's own units: [N, 3, H, W]; or a RewardError."""
        texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
        return self.scorer.image_gradient(name, images, texts, metadata)

    def pulls(self, gradients: Mapping[str, Tensor], scores: Mapping[str, Scores], epoch: int = 0) -> dict[str, Tensor]:
        """What each term with `gradient: true` adds to the total's gradient at the final latents.

            weight_t * route_t * gate_t * sign_t / scale_t * gradient_t

        Args:
            gradients: name -> [N, ...], in the reward's own units.
            scores: name -> scores of the same N images.
            epoch: whose weights.

        Returns:
            name -> [N, ...], float32.
        """
        added = {}
        for name, gradient in gradients.items():
            counted = scores[name].scored & self.passes(name, scores)
            factor = self._weigh(name, torch.ones(len(gradient)), counted, scores[name], epoch)
            weighted = factor.reshape(-1, *[1] * (gradient.ndim - 1)) * gradient
            added[name] = weighted.nan_to_num(nan=0.0)  # of an image that was left out
        return added

    def _weigh(
        self, name: str, values: Tensor, counted: Tensor, scores: Scores, epoch: int, clip: float | None = None
    ) -> Tensor:
        """A term's scores or half differences, scaled, clipped, weighted and routed; 0 where they are not counted."""
        if not bool(counted.any()):
            return torch.zeros(len(values))  # of a term that has never scored, nobody knows the scale
        weighted = self.factor(name, epoch) * values
        if clip is not None:
            bound = abs(self.terms[name].weight_at(epoch)) * clip
            weighted = weighted.clamp(-bound, bound)
        return torch.where(counted, weighted * scores.multiplier, 0.0)

    def passes(self, name: str, scores: Mapping[str, Scores]) -> Tensor:
        """Whether both branches of a pair pass a term's gate: [2P], bool, the same for both."""
        gate = self.terms[name].gate
        if gate is None:
            return torch.ones(len(scores[name].values), dtype=torch.bool)
        other = scores[gate.reward]
        score = other.values.float()  # as the bounds: a float32 of 0.8 is not above 0.8
        passing = other.scored & (score > gate.above) & (score < gate.below)
        return passing.view(-1, 2).all(dim=1).repeat_interleave(2)

    def preference(self, name: str, differences: Mapping[str, HalfDifferences]) -> Tensor:
        """How much better a term finds a branch than its partner, in the reward's own units: [2P]."""
        return self._sign(name) * differences[name].values

    # State: the running deviations

    def state_dict(self) -> dict[str, Any]:
        """Running deviations, by name."""
        return {name: running.state_dict() for name, running in self.running.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the deviations of terms of the same name; a new term starts its own."""
        for name, running in self.running.items():
            if name in state:
                running.load_state_dict(state[name])
