"""Evaluator: generates images without churn, scores them, and compares the tuned model with the base.

    prompts --generate--> images --score--> rewards and metrics --update--> Comparison --compute--> rows of `test`

`validate` uses the first two steps, `predict` the first alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.evaluation.comparison import Comparison, GeneratedImages, MetricRow
from lightning_fdfo.evaluation.embedders import named_embedder
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.generate import encode_prompts, generate
from lightning_fdfo.prompts import IndexedPrompt, Prompt
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.routing import is_for, routes
from lightning_fdfo.reward.scores import Scores
from lightning_fdfo.settings import Evaluation, FailurePolicy, Sampling
from lightning_fdfo.training.base_weights import BaseWeights


class Evaluated(Protocol):
    """What an evaluator asks of `FDFOModule`, at the moment when it needs it."""

    flow: FlowModel
    rewards: RewardMix
    sampling: Sampling
    evaluation: Evaluation
    failures: FailurePolicy
    seed: int


class Evaluator:
    """What `validate`, `test` and `predict` do with a flow, a mixture and its metrics.

    Args:
        module: whose settings count: the flow, loaded before the first image; the mixture that trains; `sampling`,
            whose churn is not used; `evaluation`; `failures`, by which a reward that fails leaves its images without a
            score or ends the run; and the seed, which fixes latents and bootstraps. Metrics are built once, here.

    Raises:
        ConfigurationError: a metric has the name of a reward, or is called `reward`.
    """

    def __init__(self, module: Evaluated) -> None:
        self.module = module
        evaluation = module.evaluation
        self.metrics = RewardMix(evaluation.metrics) if evaluation.metrics else None
        self.embedder = named_embedder(evaluation.diversity) if evaluation.diversity is not None else None
        self.rows: list[MetricRow] = []
        """What the last `test` has computed."""
        self._unscored: set[str] = set()
        self._encoded: dict[tuple[object, ...], Conditioning] = {}
        self._base: BaseWeights | None = None
        self._comparison: Comparison | None = None
        names = [name for mixture in self.mixtures for name in mixture.terms]
        taken = sorted({name for name in names if name == "reward" or names.count(name) > 1})
        if taken:
            raise ConfigurationError(f"rewards and metrics are logged by name: {taken} would be two; rename one")

    @property
    def mixtures(self) -> list[RewardMix]:
        """The rewards, and the metrics if there are any."""
        return [self.module.rewards] if self.metrics is None else [self.module.rewards, self.metrics]

    def fetch(self, test: bool) -> None:
        """Finds the files that rewards, metrics and, for `test`, the embedder need; fetches what is missing."""
        for mixture in self.mixtures:
            mixture.fetch()
        if test and self.embedder is not None:
            self.embedder.fetch()

    def setup(self, device: torch.device) -> None:
        """Puts rewards and metrics on the device."""
        for mixture in self.mixtures:
            mixture.setup(device)

    def expect(self, prompts: Iterable[Prompt]) -> None:
        """Takes the prompts to come: a name that none of them goes to gets no numbers."""
        self._encoded.clear()
        metadata = [prompt.metadata for prompt in prompts]
        names = [name for mixture in self.mixtures for name in mixture.terms]
        self._unscored = {name for name in names if not any(is_for(name, row) for row in metadata)}

    def encode(self, batch: Sequence[IndexedPrompt]) -> Conditioning:
        """Conditioning of all rows, on the CPU."""
        prompts, scale = [row.prompt for row in batch], self.module.sampling.guidance_scale
        return encode_prompts(self.module.flow, prompts, scale, len(prompts)).to("cpu")

    def encode_once(self, batch: Sequence[IndexedPrompt]) -> Conditioning:
        """The same, kept for the next validation, which has the same batches."""
        scale = self.module.sampling.guidance_scale
        key = (scale, *((row.prompt.text, row.prompt.negative) for row in batch))
        if key not in self._encoded:
            self._encoded[key] = self.encode(batch)
        return self._encoded[key]

    def generate(
        self, batch: Sequence[IndexedPrompt], device: torch.device, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Images of all rows, [N, 3, H, W] in [0, 1]; latents are a function of seed, index and repeat.

        Args:
            batch: N rows.
            device: where the model is.
            conditioning: of the rows, if they are encoded already.
        """
        return generate(
            self.module.flow,
            [row.prompt for row in batch],
            [row.prompt_index for row in batch],
            seed=self.module.seed,
            sampling=self.module.evaluation.sampling(self.module.sampling),
            device=device,
            repeats=[row.repeat for row in batch],
            conditioning=conditioning,
        )

    def score(self, images: Tensor, batch: Sequence[IndexedPrompt], epoch: int) -> dict[str, Scores]:
        """Scores of all rows, by name.

        The total, `reward`, is left out while a term's deviation is not known yet, and a name that no expected prompt
        goes to.
        """
        texts, metadata = [row.prompt.text for row in batch], [row.prompt.metadata for row in batch]
        rewards, *metrics = (
            mix(images, texts, metadata, routes=routes(mix.terms, metadata), drop=self.module.failures.drops_pairs)
            for mix in self.mixtures
        )
        total = {"reward": self.module.rewards.total(rewards, epoch)} if self.module.rewards.scales_known else {}
        scores = total | rewards | (metrics[0] if metrics else {})
        return {name: value for name, value in scores.items() if name not in self._unscored}

    def evaluate(
        self, batch: Sequence[IndexedPrompt], device: torch.device, epoch: int, conditioning: Conditioning
    ) -> GeneratedImages:
        """Images of all rows, and their scores."""
        images = self.generate(batch, device, conditioning)
        return GeneratedImages(images, self.score(images, batch, epoch))

    def validate(self, batch: Sequence[IndexedPrompt], device: torch.device, epoch: int) -> dict[str, Any]:
        """The rows that count.

        Returns:
            `images` [N, 3, H, W] on the CPU, `prompts`, and `scores`: name -> `Scores`, float32; see `score`.
        """
        images, scores = self.evaluate(batch, device, epoch, self.encode_once(batch))
        prompts = [row.prompt.text for row in batch if row.counted]
        count = len(prompts)  # the others come last
        return {
            "images": images[:count].cpu(),
            "prompts": prompts,
            "scores": {name: score.select(slice(count)).rounded() for name, score in scores.items()},
        }

    def check_repeats(self, images_per_prompt: int) -> None:
        """Raises ConfigurationError if `test` generates too few images per prompt to tell how diverse they are."""
        if self.embedder is not None and images_per_prompt < 2:
            raise ConfigurationError(
                f"evaluation.diversity: expected data.images_per_prompt of at least 2, got {images_per_prompt}"
            )

    def start_comparison(self, device: torch.device, base: BaseWeights | None) -> None:
        """Begins to compare.

        Args:
            device: where the numbers wait: that of the strategy, which gathers them.
            base: the base model, if `evaluation.base` asks for it.

        Raises:
            ConfigurationError: the base is asked for, and gone.
        """
        if self.module.evaluation.base and base is None:
            raise ConfigurationError(
                "evaluation.base: the whole transformer has been trained, and the base's weights are gone; "
                "test a new module with ckpt_path, or set evaluation.base false"
            )
        self._base = base if self.module.evaluation.base else None
        if self.embedder is not None:
            self.embedder.setup(device)
        better = {name: reward.higher_is_better for mix in self.mixtures for name, reward in mix.rewards.items()}
        self._comparison = Comparison(
            self.module.evaluation, {"reward": True} | better, self.embedder, self.module.seed, device
        )

    def compare(self, batch: Sequence[IndexedPrompt], device: torch.device, epoch: int) -> None:
        """Adds a batch: images of the tuned model and, from the same latents, of the base."""
        conditioning = self.encode(batch)
        tuned, untuned = self.evaluate(batch, device, epoch, conditioning), None
        if self._base is not None:
            with self._base.in_place():
                untuned = self.evaluate(batch, device, epoch, conditioning)
        self._started().update([row.prompt_index for row in batch if row.counted], tuned, untuned)

    def finish_comparison(self) -> list[MetricRow]:
        """Computes `rows` over all devices; each device must call it."""
        self.rows = self._started().compute()
        return self.rows

    def _started(self) -> Comparison:
        if self._comparison is None:
            raise RuntimeError("start_comparison has not been called")
        return self._comparison
