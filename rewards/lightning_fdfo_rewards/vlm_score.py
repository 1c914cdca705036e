"""VLMScore: a vision-language model is asked whether the image matches the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fdfo_rewards.model_reward import DType, ModelReward
from lightning_fdfo_rewards.vision_language_model import QWEN, Part, VLMReward

TEMPLATE = 'Does this image match the caption "{prompt}"? Answer Yes or No.'


class VLMScore(VLMReward, ModelReward):
    """100 * sigmoid(logit of `yes` - logit of `no`) for the first token of the answer.

    Args:
        pretrained: a model in the manner of Qwen2.5-VL or Qwen3-VL: a hub name or a folder.
        template: the question, with `{prompt}` in it.
        yes: the good answer; one token.
        no: the bad one; one token.
        image_size: pixels of a side, to which an image is resized (bilinear); a multiple of the model's patches, 28 for
            Qwen2.5-VL, 32 for Qwen3-VL.
        revision: branch, tag or commit on the hub.
        dtype: of the weights, float32 or bfloat16.
        batch_size: images per forward.
        device: where it runs; None: beside the flow.
        shard: spreads the model over all devices that the process sees, layer by layer (accelerate's `device_map`), for
            one that does not fit on `device`. Several processes would each spread theirs over all.
        antialias: whether a smaller size averages over all pixels. False samples four neighbours of each, as the
            paper's reference does: at 1024 pixels fine patterns turn into others that are not in the image.

    Raises:
        ConfigurationError: an option out of range; from `check`: a prompt with a control word of the model; from
            `fetch`: weights that cannot be had; from `setup`: a folder, size or answer that the model cannot do with.

    Example:
        >>> VLMScore(template="Is this {prompt}?").ask("a cat")
        'Is this a cat?'

    Source: arXiv 2603.12893; image_size and the question are that paper's.
    """

    range = (0.0, 100.0)

    def __init__(
        self,
        pretrained: str = QWEN.source,
        template: str = TEMPLATE,
        yes: str = "Yes",
        no: str = "No",
        image_size: int = 504,
        revision: str = "main",
        dtype: DType = "bfloat16",
        batch_size: int = 8,
        device: str | None = None,
        shard: bool = False,
        antialias: bool = True,
    ) -> None:
        super().__init__(
            pretrained, template, (yes, no), image_size, revision, dtype, batch_size, device, shard, antialias
        )

    def message(self, prompt: str) -> list[Part]:
        """The image, then the question."""
        return [None, self.ask(prompt)]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores one batch."""
        return 100 * torch.sigmoid(self.log_odds(images[:, None], prompts))
