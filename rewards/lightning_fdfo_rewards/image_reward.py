"""ImageReward: BLIP, with a head that was trained on people's rankings of images.

The official checkpoint is in BLIP's own format. Here it is loaded into transformers' BLIP classes, and the scores are
held to those of the package `image-reward` by golden numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import HubFiles, cached_weak
from lightning_fdfo_rewards.clip import count_longer, load_tokenizer
from lightning_fdfo_rewards.model_reward import DType, LinearHead, ModelReward, from_tensors, frozen
from lightning_fdfo_rewards.preprocessing import crop_to_square, normalize

REPOSITORY = "THUDM/ImageReward"
BERT_TOKENIZER = HubFiles("google-bert/bert-base-uncased", ("tokenizer*.json",), "Apache-2.0")
NUM_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' data: they make the score a standard one."""


class ImageReward(ModelReward):
    """(head(first token of BLIP's text encoder, which looks at the image) - mean) / std, about -2 to 2.

    Args:
        checkpoint: the hub repository, a folder with `ImageReward.pt`, or such a file.
        config: the hub repository, a folder with `med_config.json`, or such a file.
        tokenizer: BERT's, uncased: a hub name or a folder.
        revision: of `checkpoint` and `config`: branch, tag or commit on the hub.
        num_heads: attention heads of the image encoder; the checkpoint gives its other sizes.
        dtype: of the weights, float32 or bfloat16; the head is always float32.
        batch_size: images per forward.
        device: where it runs; None: beside the flow.

    Raises:
        ConfigurationError: an option out of range; from `fetch`: weights that cannot be had; from `setup`: a file that
            is no such checkpoint.

    Example:
        >>> [files.files[0] for files in ImageReward().hub_files]
        ['ImageReward.pt', 'med_config.json', 'tokenizer*.json']

    Source: Xu et al. 2023, arXiv 2304.05977.
    """

    needs = "the prompt; 35 tokens are read"
    hub_files = (
        HubFiles(REPOSITORY, ("ImageReward.pt",), "Apache-2.0"),
        HubFiles(REPOSITORY, ("med_config.json",), "Apache-2.0"),
        BERT_TOKENIZER,
    )

    def __init__(
        self,
        checkpoint: str = REPOSITORY,
        config: str = REPOSITORY,
        tokenizer: str = BERT_TOKENIZER.source,
        revision: str = "main",
        num_heads: int = 16,
        dtype: DType = "float32",
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        super().__init__(dtype, batch_size, device)
        self.num_heads = num_heads
        self.hub_files = (
            HubFiles(checkpoint, ("ImageReward.pt",), "Apache-2.0", revision),
            HubFiles(config, ("med_config.json",), "Apache-2.0", revision),
            HubFiles(tokenizer, BERT_TOKENIZER.files, BERT_TOKENIZER.licence),
        )

    def load(self, device: torch.device) -> BLIPWithHead:
        """Reads the checkpoint and the tokenizer."""
        checkpoint, config, tokenizer = (files.fetch() for files in self.hub_files)
        self._tokenizer = load_tokenizer(tokenizer)
        return _load_model(checkpoint, config, self.num_heads, self.dtype, device)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more than 35 tokens."""
        return count_longer(self._tokenizer, prompts, NUM_TOKENS)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores one batch."""
        model: BLIPWithHead = self.model
        pixels = normalize(crop_to_square(images, model.image_size, rounding=round))
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=NUM_TOKENS, return_tensors="pt"
        )
        return model(pixels, tokens.input_ids.to(pixels.device), tokens.attention_mask.to(pixels.device))  # type: ignore[no-any-return]


class BLIPWithHead(nn.Module):
    """Image encoder, text encoder with cross-attention to the image, head.

    Args:
        image_encoder: transformers' BlipVisionModel.
        text_encoder: transformers' BlipTextModel.
        head: linear layers from the first token's hidden state to a number.
    """

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module, head: LinearHead) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder, self.head = image_encoder, text_encoder, head

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return int(self.image_encoder.config.image_size)  # type: ignore[union-attr, arg-type]

    def forward(self, pixels: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Scores of normalised pixels [N, 3, size, size] and tokens [N, 35]: [N], float32."""
        image = self.image_encoder(
            pixel_values=pixels.to(next(self.image_encoder.parameters()).dtype)
        ).last_hidden_state
        hidden = self.text_encoder(
            input_ids=token_ids,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
            is_decoder=False,  # the configuration says True, which is what adds the cross-attention
        ).last_hidden_state
        return (self.head(hidden[:, 0].float())[:, 0] - MEAN) / STD  # type: ignore[no-any-return]


@cached_weak
def _load_model(file: Path, config: Path, num_heads: int, dtype: str, device: torch.device) -> BLIPWithHead:
    from transformers import BlipTextModel, BlipVisionModel

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        med_config = json.loads(config.read_text(encoding="utf-8"))
        vision, text = _vision_config(tensors, num_heads), _text_config(tensors, med_config)
        image_encoder = from_tensors(BlipVisionModel, vision, dict(_image_tensors(tensors)), dtype, device, file)
        text_tensors = _below(tensors, "blip.text_encoder.")
        text_tensors.pop("embeddings.position_ids", None)  # 0, 1, 2, …: not a weight
        text_encoder = from_tensors(BlipTextModel, text, text_tensors, dtype, device, file, add_pooling_layer=False)
        head = LinearHead(_below(tensors, "mlp."))
        return frozen(BLIPWithHead(image_encoder, text_encoder, head), device)  # type: ignore[return-value]
    except ConfigurationError:
        raise
    except Exception as error:  # pickle, zip, JSON and key errors of a file that is something else
        raise ConfigurationError(f"ImageReward: {file} is no ImageReward checkpoint: {error!r}") from error


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _vision_config(tensors: Mapping[str, Tensor], num_heads: int) -> Any:
    """Sizes of the image encoder, read off the tensors' shapes."""
    from transformers import BlipVisionConfig

    own = _below(tensors, "blip.visual_encoder.")
    patch_size = own["patch_embed.proj.weight"].shape[-1]
    return BlipVisionConfig(
        hidden_size=own["cls_token"].shape[-1],
        intermediate_size=own["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in own if name.startswith("blocks.")}),
        num_attention_heads=num_heads,
        image_size=math.isqrt(own["pos_embed"].shape[1] - 1) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,  # timm's; transformers' own default is 1e-5
    )


def _text_config(tensors: Mapping[str, Tensor], med_config: Mapping[str, Any]) -> Any:
    """The text encoder's configuration; the width of what it looks at is the image encoder's."""
    from transformers import BlipTextConfig

    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "hidden_act", "layer_norm_eps",
    )  # fmt: skip
    return BlipTextConfig(
        **{name: med_config[name] for name in names if name in med_config},
        encoder_hidden_size=tensors["blip.visual_encoder.cls_token"].shape[-1],
        is_decoder=True,
        bos_token_id=None,  # generation's, which scoring has no use for
        sep_token_id=None,
    )


_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^norm\.", "post_layernorm."),
)
"""BLIP's names of the image encoder -> transformers'."""


def _image_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The image encoder's tensors under transformers' names."""
    for name, tensor in _below(tensors, "blip.visual_encoder.").items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        yield name, tensor
