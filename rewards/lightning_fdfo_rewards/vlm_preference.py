"""VLMPreference: a vision-language model is shown two images, and asked which of them matches the prompt better."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fdfo_rewards.model_reward import DType, ModelPairReward
from lightning_fdfo_rewards.vision_language_model import QWEN, Part, VLMReward

TEMPLATE = 'Which image matches the caption "{prompt}" better? Answer A or B.'


class VLMPreference(VLMReward, ModelPairReward):
    """How much likelier the first token of the answer is `first` than `second`, over both orders of the images.

        preference = (t(first image, second image) - t(second image, first image)) / 2      t = p(first) - p(second)

    p are the probabilities of the two answers alone, so that t = tanh((logit(first) - logit(second)) / 2). A model that
    always says A is a tie.

    Args:
        pretrained: a model in the manner of Qwen2.5-VL or Qwen3-VL: a hub name or a folder.
        template: the question, with `{prompt}` in it; it comes after both images.
        first: what the first image is called, and the answer in its favour; one token.
        second: the second one's; one token.
        image_size: pixels of a side, to which each image is resized (bilinear); a multiple of the model's patches, 28
            for Qwen2.5-VL, 32 for Qwen3-VL.
        revision: branch, tag or commit on the hub.
        dtype: of the weights, float32 or bfloat16.
        batch_size: pairs per forward; each goes through it twice.
        device: where it runs; None: beside the flow.
        shard: spreads the model over all devices that the process sees, as VLMScore does.
        antialias: whether a smaller size averages over all pixels.

    Raises:
        ConfigurationError: as VLMScore; from `check`, `fetch` and `setup` too.

    Example:
        >>> VLMPreference().message("a cat")
        ['A:', None, 'B:', None, 'Which image matches the caption "a cat" better? Answer A or B.']
    """

    def __init__(
        self,
        pretrained: str = QWEN.source,
        template: str = TEMPLATE,
        first: str = "A",
        second: str = "B",
        image_size: int = 504,
        revision: str = "main",
        dtype: DType = "bfloat16",
        batch_size: int = 4,
        device: str | None = None,
        shard: bool = False,
        antialias: bool = True,
    ) -> None:
        super().__init__(
            pretrained, template, (first, second), image_size, revision, dtype, batch_size, device, shard, antialias
        )

    def message(self, prompt: str) -> list[Part]:
        """Both images by their names, then the question."""
        first, second = self.answers
        return [f"{first}:", None, f"{second}:", None, self.ask(prompt)]

    def prefer(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compares one batch, in both orders."""
        there, back = torch.stack([first, second], dim=1), torch.stack([second, first], dim=1)
        odds = self.log_odds(torch.cat([there, back]), [*prompts, *prompts])
        one, other = torch.tanh(odds / 2).chunk(2)
        return (one - other) / 2
