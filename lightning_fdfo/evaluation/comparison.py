"""What `test` computes: all numbers of the tuned model, of the base model, and of their difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_fdfo.evaluation.diversity import Distances, Diversity
from lightning_fdfo.evaluation.embedders import Embedder
from lightning_fdfo.evaluation.prompt_mean import Mean, PromptMean, prompt_mean
from lightning_fdfo.evaluation.win_rate import WinRate, WinRates
from lightning_fdfo.image_statistics import image_statistics
from lightning_fdfo.reward.scores import Scores
from lightning_fdfo.settings import Evaluation

DIVERSITY = "diversity"
SIDES = ("tuned", "base", "difference")


class GeneratedImages(NamedTuple):
    """Images of a batch, and what rewards and metrics say of them."""

    images: Tensor
    """[N, 3, H, W]"""
    scores: dict[str, Scores]
    """name -> scores of N images"""


class Estimate(NamedTuple):
    """A mean over images."""

    mean: float
    standard_error: float
    """over prompts, see `prompt_mean`"""


class MetricRow(NamedTuple):
    """A number that `test` computes; None where there is no base to compare with, or neither is better."""

    name: str
    tuned: Estimate
    base: Estimate | None
    difference: Estimate | None
    win_rate: WinRate | None


class Comparison:
    """Collects batches on each device, and compares over all.

    Args:
        evaluation: what is computed.
        higher_is_better: of the scores for which wins are counted.
        embedder: set up; None leaves diversity out.
        seed: of the bootstrap.
        device: where the numbers wait: that of the strategy, which gathers them.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        higher_is_better: Mapping[str, bool],
        embedder: Embedder | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.evaluation = evaluation
        self.higher_is_better = higher_is_better
        self.embedder = embedder
        self.names: list[str] = []
        self.compared: list[str] = []
        """Names for which wins are counted."""
        sides = SIDES if evaluation.base else SIDES[:1]
        self._means = {side: PromptMean() for side in sides}
        self._diversities = {side: Diversity() for side in sides[:2] if embedder is not None}
        self._wins = WinRates(evaluation.confidence, evaluation.num_resamples, seed) if evaluation.base else None
        wins: list[Metric] = [] if self._wins is None else [self._wins]
        for metric in (*self._means.values(), *self._diversities.values(), *wins):
            metric.to(device)

    def update(self, prompts: Sequence[int], tuned: GeneratedImages, base: GeneratedImages | None) -> None:
        """Adds a batch.

        Args:
            prompts: C numbers of prompts.
            tuned: by the tuned model; N >= C images, of which the first C count.
            base: by the base model, from the same latents; None if it is left out.
        """
        numbers, counted = torch.tensor(prompts, dtype=torch.long), slice(len(prompts))
        images_of = {"tuned": tuned} | ({} if base is None else {"base": base})
        values = {side: _values(each, counted) for side, each in images_of.items()}
        self.names = list(values["tuned"])
        self.compared = [name for name in self.names if name in self.higher_is_better]
        columns = {side: _columns(each, self.names) for side, each in values.items()}
        if base is not None:
            (ours, scored), (theirs, also_scored) = columns["tuned"], columns["base"]
            columns["difference"] = (ours - theirs, scored & also_scored)
        for side, metric in self._means.items():
            metric.update(numbers, *columns[side])
        if self._wins is not None:
            signs = torch.tensor([1.0 if self.higher_is_better[name] else -1.0 for name in self.compared])
            (ours, scored), (theirs, also_scored) = (
                _columns(values[side], self.compared) for side in ("tuned", "base")
            )
            self._wins.update(numbers, signs * ours, signs * theirs, scored & also_scored)
        for side, diversity in self._diversities.items():
            diversity.update(numbers, cast(Embedder, self.embedder)(images_of[side].images)[counted])

    def compute(self) -> list[MetricRow]:
        """Over all batches and devices; each device must call it."""
        means = {side: metric.compute() for side, metric in self._means.items()}
        rates = {} if self._wins is None else dict(zip(self.compared, self._wins.compute(), strict=True))
        rows = []
        for index, name in enumerate(self.names):
            estimates = [_estimate(means[side], index) if side in means else None for side in SIDES]
            rows.append(_row(name, estimates, rates.get(name)))
        if self._diversities:
            found = {side: metric.compute() for side, metric in self._diversities.items()}
            rows.append(_row(DIVERSITY, list(_diversities(found)), None))
        return rows


def _values(generated: GeneratedImages, counted: slice) -> dict[str, Scores]:
    statistics = {f"image/{name}": Scores.of(value.cpu()) for name, value in image_statistics(generated.images).items()}
    return {name: values.select(counted) for name, values in (generated.scores | statistics).items()}


def _columns(scores: Mapping[str, Scores], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The values of some names, [N, K], and which of them there are."""
    count = len(next(iter(scores.values())).values)
    values = [torch.zeros(count, 0), *(scores[name].values.double()[:, None] for name in names)]
    scored = [torch.zeros(count, 0, dtype=torch.bool), *(scores[name].scored[:, None] for name in names)]
    return torch.cat(values, dim=1), torch.cat(scored, dim=1)


def _row(name: str, estimates: Sequence[Estimate | None], rate: WinRate | None) -> MetricRow:
    tuned, base, difference = estimates
    return MetricRow(name, cast(Estimate, tuned), base, difference, rate)


def _estimate(mean: Mean, index: int = 0) -> Estimate:
    return Estimate(mean.mean[index].item(), mean.standard_error[index].item())


def _diversities(found: Mapping[str, Distances]) -> Iterator[Estimate | None]:
    """Of each side; prompts are as many values."""
    tuned, base = found["tuned"], found.get("base")
    distances = [
        tuned.distances,
        None if base is None else base.distances,
        None if base is None else tuned.distances - base.distances,
    ]
    for values in distances:
        yield (
            None
            if values is None
            else _estimate(prompt_mean(tuned.prompts, values[:, None], values.isfinite()[:, None]))
        )
