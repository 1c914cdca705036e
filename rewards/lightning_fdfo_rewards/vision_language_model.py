"""A vision-language model in the manner of Qwen2.5-VL or Qwen3-VL: which of two words it would answer.

VLMScore shows it one image, VLMPreference two.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import HubFiles, cached_weak
from lightning_fdfo.reward import Metadata
from lightning_fdfo_rewards.clip import load_tokenizer
from lightning_fdfo_rewards.model_reward import DType, LoadedModel, frozen
from lightning_fdfo_rewards.preprocessing import normalize

QWEN = HubFiles("Qwen/Qwen2.5-VL-7B-Instruct", licence="Apache-2.0")
Part = str | None
"""Of a message: text, or None where an image stands."""

_CONTROL = re.compile(r"<\|\w+\|>")


class VLMReward(LoadedModel):
    """What VLMScore and VLMPreference share: options, the prompt's check, the model.

    Args:
        pretrained: a model in the manner of Qwen2.5-VL or Qwen3-VL: a hub name or a folder.
        template: the question, with `{prompt}` in it.
        answers: two, of one token each.
        image_size: pixels of a side, to which an image is resized (bilinear); a multiple of the model's patches, 28 for
            Qwen2.5-VL, 32 for Qwen3-VL.
        revision: branch, tag or commit on the hub.
        dtype: of the weights, float32 or bfloat16.
        batch_size: images per forward, or pairs.
        device: where it runs; None: beside the flow.
        shard: see VLMScore.
        antialias: see VLMScore.

    Raises:
        ConfigurationError: as VLMScore.
    """

    needs = "the prompt"
    hub_files = (QWEN,)

    def __init__(
        self,
        pretrained: str,
        template: str,
        answers: tuple[str, str],
        image_size: int,
        revision: str,
        dtype: DType,
        batch_size: int,
        device: str | None,
        shard: bool,
        antialias: bool,
    ) -> None:
        super().__init__(dtype, batch_size, device)
        self.shard = shard
        self.antialias = antialias
        if "{prompt}" not in template:
            raise ConfigurationError(f"{self.name}: expected a template with {{prompt}} in it, got {template!r}")
        if answers[0] == answers[1]:
            raise ConfigurationError(f"{self.name}: expected two different answers, got {answers[0]!r} twice")
        self.template = template
        self.answers = answers
        self.image_size = image_size
        self.hub_files = (HubFiles(pretrained, revision=revision, licence="see its repository"),)
        if pretrained == QWEN.source:
            self.hub_files = (HubFiles(pretrained, revision=revision, licence=QWEN.licence),)

    def check(self, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError for a prompt that would be read as a part of the conversation's frame."""
        if found := _CONTROL.search(prompt):
            raise ConfigurationError(f"{self.name}: {found[0]!r} in {prompt[:80]!r} is a control word of the model")

    def ask(self, prompt: str) -> str:
        """The question about a prompt."""
        return self.template.replace("{prompt}", prompt)

    @abstractmethod
    def message(self, prompt: str) -> list[Part]:
        """What the model is shown: the question, and where images stand."""

    def load(self, device: torch.device) -> VisionLanguageModel:
        """Reads the model and the tokenizer; what can be checked without the weights is checked first."""
        folder = self.hub_files[0].fetch()
        frame = read_frame(folder, self.image_size, self.name)
        tokenizer = load_tokenizer(folder)
        first, second = (_single_token(tokenizer, answer, self.name) for answer in self.answers)
        try:
            model = _load_model(folder, self.dtype, device, self.shard)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.name}: {error}") from error
        return VisionLanguageModel(model, tokenizer, frame, (first, second))

    def log_odds(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """logit(first answer) - logit(second one), for images [N, K, 3, H, W], K a message: [N], float32."""
        model: VisionLanguageModel = self.model
        size = (self.image_size, self.image_size)
        resized = F.interpolate(images.flatten(0, 1), size, mode="bilinear", antialias=self.antialias)
        return model.log_odds(resized, [self.message(prompt) for prompt in prompts])


class Frame(NamedTuple):
    """How the model wants its images, from its own configuration."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def patches(self, images: Tensor) -> Tensor:
        """Square images [N, 3, S, S] in [0, 1] -> [N (S / patch_size)^2, 3 temporal_patch_size patch_size^2].

        Patches that will be merged into one token stand together; a still image is repeated in time.
        """
        pixels = normalize(images, self.mean, self.std)
        count, grid = len(pixels), pixels.shape[-1] // self.patch_size
        coarse = grid // self.merge_size
        blocks = pixels.reshape(count, 3, coarse, self.merge_size, self.patch_size, coarse, self.merge_size, -1)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
        repeated = blocks.expand(*[-1] * 6, self.temporal_patch_size, -1, -1)
        return repeated.reshape(count * grid * grid, -1)


class VisionLanguageModel(NamedTuple):
    """A loaded model, and what its questions need."""

    model: Any
    tokenizer: Any
    frame: Frame
    answers: tuple[int, int]
    """token numbers"""

    def log_odds(self, images: Tensor, messages: Sequence[Sequence[Part]]) -> Tensor:
        """logit(first answer) - logit(second one) for N messages and their images, [N K, 3, S, S]: [N], float32."""
        grid = images.shape[-1] // self.frame.patch_size
        tokens = self._tokenize(messages, (grid // self.frame.merge_size) ** 2).to(images.device)
        logits = self.model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            mm_token_type_ids=(tokens.input_ids == self.model.config.image_token_id).long(),  # places in the image
            pixel_values=self.frame.patches(images).to(self.model.dtype),
            image_grid_thw=torch.tensor([[1, grid, grid]] * len(images), device=images.device),
            logits_to_keep=1,
            use_cache=False,
        ).logits[:, -1]
        first, second = self.answers
        odds: Tensor = logits[:, first].float() - logits[:, second].float()
        return odds

    def _tokenize(self, messages: Sequence[Sequence[Part]], num_image_tokens: int) -> Any:
        """The conversations, padded on the left, so that the answer stands at the end of each."""
        image_token = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        conversations = []
        for message in messages:
            content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in message]
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            conversations.append(text.replace(image_token, image_token * num_image_tokens))
        return self.tokenizer(conversations, padding=True, padding_side="left", return_tensors="pt")


def read_frame(folder: Path, image_size: int, name: str) -> Frame:
    """The image processor's numbers; raises ConfigurationError for a size that does not fit."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder)
        frame = Frame(
            processor.patch_size,
            processor.temporal_patch_size,
            processor.merge_size,
            tuple(processor.image_mean),
            tuple(processor.image_std),
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"{name}: {folder} holds no model like Qwen2.5-VL or Qwen3-VL: {error}") from error
    unit = frame.patch_size * frame.merge_size
    if image_size < unit or image_size % unit:
        nearest = max(unit, round(image_size / unit) * unit)
        raise ConfigurationError(
            f"{name}: expected image_size to be a multiple of {unit} for this model, got {image_size}; "
            f"nearest: {nearest}"
        )
    return frame


def _single_token(tokenizer: Any, answer: str, name: str) -> int:
    """The number of an answer's only token."""
    numbers = tokenizer(answer, add_special_tokens=False).input_ids
    if len(numbers) != 1:
        raise ConfigurationError(f"{name}: expected an answer of one token, got {answer!r} of {len(numbers)}")
    return int(numbers[0])


@cached_weak
def _load_model(folder: Path, dtype: str, device: torch.device, shard: bool) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            attn_implementation="sdpa",
            device_map="auto" if shard else None,
        )
    except Exception as error:  # of another class's configuration, safetensors' own, a missing file
        raise ConfigurationError(f"{folder} holds no model that transformers can read: {error}") from error
    return model.requires_grad_(False).eval() if shard else frozen(model, device)
