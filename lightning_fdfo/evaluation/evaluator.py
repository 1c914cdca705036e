"""Evaluator: generates images without churn, scores them, and compares the tuned model with the base.

    prompts --generate--> images --score--> rewards and metrics --update--> Comparison --compute--> rows of `test`

`validate` uses the first two steps, `predict` the first alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.evaluation.comparison import Comparison, GeneratedImages, MetricRow
from lightning_fdfo.evaluation.embedders import named_embedder
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.generate import encode_prompts, generate
from lightning_fdfo.prompts import IndexedPrompt, Prompt
from lightning_fdfo.reward.against import score_against, terms_that_validate
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
    base: BaseWeights | None


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
        self._base_images: dict[int, Tensor] = {}
        """By the base model, of the batches that validations repeat, by their number, in 8 bits."""
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

    @property
    def pair_terms(self) -> list[list[str]]:
        """Of each mixture, the names of the terms that compare the tuned model's images with the base's."""
        return [terms_that_validate(mix) for mix in self.mixtures]

    @property
    def needs_base(self) -> bool:
        """Whether a term compares with the base model's images, in validation too."""
        return any(self.pair_terms)

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
        self._base_images.clear()
        metadata = [prompt.metadata for prompt in prompts]
        names = [name for mixture in self.mixtures for name in mixture.terms]
        self._unscored = {name for name in names if not any(is_for(name, row) for row in metadata)}

    def encode(self, batch: Sequence[IndexedPrompt]) -> Conditioning:
        """Conditioning of all rows, on the CPU."""
        prompts, scale = [row.prompt for row in batch], self.module.sampling.guidance_scale
        return encode_prompts(self.module.flow, prompts, scale, len(prompts)).to("cpu")

    def encode_once(self, batch: Sequence[IndexedPrompt]) -> Conditioning:
        """The same, kept for the next validation, which has the same batches."""
        key = self._key(batch)
        if key not in self._encoded:
            self._encoded[key] = self.encode(batch)
        return self._encoded[key]

    def _key(self, batch: Sequence[IndexedPrompt]) -> tuple[object, ...]:
        """Of a batch that validations repeat."""
        return self.module.sampling.guidance_scale, *((row.prompt.text, row.prompt.negative) for row in batch)

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

    def score(
        self, images: Tensor, batch: Sequence[IndexedPrompt], epoch: int, base_images: Tensor | None = None
    ) -> dict[str, Scores]:
        """Scores of all rows, by name.

        The total, `reward`, is left out while a term's deviation is not known yet, and where a term with a weight does
        not score here, as people do not. So is a name that no expected prompt goes to.

        Args:
            images: [N, 3, H, W].
            batch: N rows.
            epoch: whose weights the total has.
            base_images: by the base model, [N, 3, H, W]: a `PairReward` says whether an image wins against them, 1, or
                loses, 0. None leaves those terms out.
        """
        texts, metadata = [row.prompt.text for row in batch], [row.prompt.metadata for row in batch]
        drop, scores = self.module.failures.drops_pairs, []
        for mix, pair_terms in zip(self.mixtures, self.pair_terms, strict=True):
            own = routes([name for name in mix.terms if name not in mix.pair_terms], metadata)
            found = mix(images, texts, metadata, routes=own, drop=drop)
            if base_images is not None and pair_terms:
                found |= score_against(mix, pair_terms, images, base_images, texts, metadata, drop=drop)
            scores.append(found)
        return self._with_total(scores, epoch)

    def _with_total(self, scores: Sequence[dict[str, Scores]], epoch: int) -> dict[str, Scores]:
        """Scores of the mixture and of the metrics, with the total before them."""
        rewards, *metrics = scores
        weighted = {name for name, term in self.module.rewards.terms.items() if not term.is_watched}
        known = self.module.rewards.scales_known and weighted <= rewards.keys()
        total = {"reward": self.module.rewards.total(rewards, epoch)} if known else {}
        found = total | rewards | (metrics[0] if metrics else {})
        return {name: value for name, value in found.items() if name not in self._unscored}

    def validate(self, batch: Sequence[IndexedPrompt], device: torch.device, epoch: int, number: int) -> dict[str, Any]:
        """The rows that count.

        Args:
            batch: N rows.
            device: where the model is.
            epoch: whose weights the total has.
            number: the batch's, the same in each validation.

        Returns:
            `images` [N, 3, H, W] on the CPU, `prompts`, and `scores`: name -> `Scores`, float32; see `score`.
        """
        images = self.generate(batch, device, self.encode_once(batch))
        base_images = self._base_images_once(batch, device, number) if self.needs_base else None
        scores = self.score(images, batch, epoch, base_images)
        prompts = [row.prompt.text for row in batch if row.counted]
        count = len(prompts)  # the others come last
        return {
            "images": images[:count].cpu(),
            "prompts": prompts,
            "scores": {name: score.select(slice(count)).rounded() for name, score in scores.items()},
        }

    def _base_images_once(self, batch: Sequence[IndexedPrompt], device: torch.device, number: int) -> Tensor:
        """The base model's images of a batch, kept for the next validation, which has the same.

        By the batch's number, not by its rows: where a model is sharded, all processes must generate at the same time.
        """
        if number not in self._base_images:
            with cast(BaseWeights, self.module.base).in_place():
                images = self.generate(batch, device, self.encode_once(batch))
            self._base_images[number] = (images * 255).round().byte().cpu()
        return self._base_images[number].to(device).float() / 255

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
        images, base_images, base = self.generate(batch, device, conditioning), None, None
        if self._base is not None:
            with self._base.in_place():
                base_images = self.generate(batch, device, conditioning)
        tuned = GeneratedImages(images, self.score(images, batch, epoch, base_images))
        if base_images is not None:
            base = GeneratedImages(base_images, self.score(base_images, batch, epoch, images))
        self._started().update([row.prompt_index for row in batch if row.counted], tuned, base)

    def finish_comparison(self) -> list[MetricRow]:
        """Computes `rows` over all devices; each device must call it."""
        self.rows = self._started().compute()
        return self.rows

    def _started(self) -> Comparison:
        if self._comparison is None:
            raise RuntimeError("start_comparison has not been called")
        return self._comparison
