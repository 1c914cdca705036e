"""CLIP models as rewards use them: two towers that embed images and texts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import cached_weak
from lightning_fdfo_rewards.model_reward import frozen


class CLIP(NamedTuple):
    """A frozen CLIP model and its tokenizer."""

    model: Any
    """transformers' CLIPModel"""
    tokenizer: Any
    """cuts and pads at the model's length"""

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return int(self.model.config.vision_config.image_size)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors of normalised pixels: [N, 3, size, size] -> [N, D], float32."""
        features = self.model.get_image_features(pixel_values=pixels.to(self.model.dtype))
        return F.normalize(_pooled(features).float(), dim=-1)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors of texts: N strings -> [N, D], float32. The two branches of a pair are embedded once."""
        different = list(dict.fromkeys(prompts))
        return self.embed_tokens(self.tokenize(different))[[different.index(prompt) for prompt in prompts]]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers, [N, 77], cut and padded."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return tokens.input_ids.to(self.model.device)  # type: ignore[no-any-return]

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many texts have more tokens than the model reads, the two specials counted."""
        return count_longer(self.tokenizer, prompts, self.model.config.text_config.max_position_embeddings)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Unit vectors of token numbers: [N, 77] -> [N, D], float32. Attention is causal: padding changes nothing."""
        return F.normalize(_pooled(self.model.get_text_features(input_ids=tokens)).float(), dim=-1)


def load_clip(folder: Path, tokenizer_folder: Path, dtype: str, device: torch.device) -> CLIP:
    """A CLIP model in the hub's layout, with the tokenizer of the same folder or of another.

    Raises:
        ConfigurationError: the folder holds no CLIP model, or the other no tokenizer.
    """
    return CLIP(_load_model(folder, dtype, device), load_tokenizer(tokenizer_folder))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; raises ConfigurationError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{folder} holds no tokenizer that transformers can read: {error}") from error


def count_longer(tokenizer: Any, texts: Sequence[str], length: int) -> int:
    """How many texts have more tokens than `length`, specials counted."""
    tokens = tokenizer(list(texts), truncation=False, verbose=False).input_ids if texts else []
    return sum(len(numbers) > length for numbers in tokens)


@cached_weak
def _load_model(folder: Path, dtype: str, device: torch.device) -> Any:
    from transformers import CLIPModel

    try:
        model, info = CLIPModel.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # of another class's configuration, safetensors' own, a missing file
        raise ConfigurationError(f"{folder} holds no CLIP model that transformers can read: {error}") from error
    if info["missing_keys"]:
        raise ConfigurationError(
            f"{folder} holds no complete CLIP model: {sorted(info['missing_keys'])[0]!r} is missing"
        )
    return frozen(model, device)


def _pooled(features: Any) -> Tensor:
    """Transformers 5 wraps the embedding, transformers 4 did not."""
    return features if isinstance(features, Tensor) else features.pooler_output
