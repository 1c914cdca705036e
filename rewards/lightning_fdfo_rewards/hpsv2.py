"""HPSv2: a CLIP ViT-H-14 that was trained on people's choices among images.

The official checkpoint is in open_clip's format. Here it is loaded into transformers' CLIPModel, and the scores are
held to those of the package `hpsv2` by golden numbers.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import HubFiles, cached_weak
from lightning_fdfo_rewards.clip import CLIP, load_tokenizer
from lightning_fdfo_rewards.model_reward import DType, ModelReward, from_tensors
from lightning_fdfo_rewards.pick_score import LAION_TOKENIZER
from lightning_fdfo_rewards.preprocessing import normalize, pad_to_square

REPOSITORY = "xswu/HPSv2"
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
END_OF_TEXT = 49407


class HPSv2(ModelReward):
    """The cosine of the image's and the prompt's embedding, about 0.2 to 0.4.

    Args:
        version: "2.0" or "2.1".
        checkpoint: the hub repository, a folder with the official file, or such a file.
        tokenizer: CLIP's: a hub name or a folder.
        revision: of `checkpoint`: branch, tag or commit on the hub.
        num_heads: attention heads of the image and of the text tower; the checkpoint gives all other sizes.
        dtype: of the weights, float32 or bfloat16.
        batch_size: images per forward.
        device: where it runs; None: beside the flow.

    Raises:
        ConfigurationError: an option out of range; from `fetch`: weights that cannot be had; from `setup`: a file that
            is no such checkpoint.

    Example:
        >>> HPSv2(version="2.0").hub_files[0].files
        ('HPS_v2_compressed.pt',)

    Source: Wu et al. 2023, arXiv 2306.09341.
    """

    range = (-1.0, 1.0)
    needs = "the prompt; 77 tokens are read"
    hub_files = (HubFiles(REPOSITORY, (FILES["2.1"],), "Apache-2.0"), LAION_TOKENIZER)

    def __init__(
        self,
        version: Literal["2.0", "2.1"] = "2.1",
        checkpoint: str = REPOSITORY,
        tokenizer: str = LAION_TOKENIZER.source,
        revision: str = "main",
        num_heads: tuple[int, int] = (16, 16),
        dtype: DType = "float32",
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        super().__init__(dtype, batch_size, device)
        self.version = str(version)  # YAML reads 2.1 without quotes as a number
        if self.version not in FILES:
            raise ConfigurationError(f"HPSv2: expected version {' or '.join(FILES)}, got {version!r}")
        self.num_heads = (num_heads[0], num_heads[1])
        self.hub_files = (
            HubFiles(checkpoint, (FILES[self.version],), "Apache-2.0", revision),
            HubFiles(tokenizer, LAION_TOKENIZER.files, LAION_TOKENIZER.licence),
        )

    def load(self, device: torch.device) -> CLIP:
        """Reads the checkpoint and the tokenizer."""
        checkpoint, folder = (files.fetch() for files in self.hub_files)
        tokenizer = load_tokenizer(folder)
        if tokenizer.eos_token_id != END_OF_TEXT:
            raise ConfigurationError(
                f"HPSv2: {folder} is not CLIP's tokenizer: a text ends with {END_OF_TEXT}, not {tokenizer.eos_token_id}"
            )
        return CLIP(_load_model(checkpoint, self.num_heads, self.dtype, device), tokenizer)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more than 77 tokens."""
        clip: CLIP = self.model
        return clip.count_truncated([clean(prompt) for prompt in prompts])

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores one batch."""
        clip: CLIP = self.model
        pixels = normalize(pad_to_square(images, clip.image_size))
        texts = [clean(prompt) for prompt in prompts]
        return (clip.embed_images(pixels) * clip.embed_texts(texts)).sum(dim=-1)


def clean(prompt: str) -> str:
    """What the package does to a prompt before its tokens are looked up; transformers' tokenizer does the rest.

    Example:
        >>> clean("“salt &amp;amp; pepper” ")
        '"salt & pepper"'
    """
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


@cached_weak
def _load_model(file: Path, num_heads: tuple[int, int], dtype: str, device: torch.device) -> Any:
    """CLIPModel from an open_clip checkpoint."""
    from transformers import CLIPModel

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        config = _config(tensors, num_heads)
        return from_tensors(CLIPModel, config, dict(_renamed(tensors)), dtype, device, file)
    except ConfigurationError:
        raise
    except Exception as error:  # pickle, zip and key errors of a file that is something else
        raise ConfigurationError(f"HPSv2: {file} is no HPSv2 checkpoint: {error!r}") from error


def _config(tensors: Mapping[str, Tensor], num_heads: tuple[int, int]) -> Any:
    """Sizes of both towers, read off the tensors' shapes."""
    from transformers import CLIPConfig

    patches, width = tensors["visual.positional_embedding"].shape
    patch_size = tensors["visual.conv1.weight"].shape[-1]
    length, text_width = tensors["positional_embedding"].shape
    vision = {
        "image_size": math.isqrt(patches - 1) * patch_size,
        "patch_size": patch_size,
        **_tower(tensors, "visual.transformer.", width, num_heads[0]),
    }
    text = {
        "vocab_size": tensors["token_embedding.weight"].shape[0],
        "max_position_embeddings": length,
        "bos_token_id": END_OF_TEXT - 1,
        "eos_token_id": END_OF_TEXT,  # the text's embedding is read off at its first
        **_tower(tensors, "transformer.", text_width, num_heads[1]),
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=tensors["text_projection"].shape[1])


def _tower(tensors: Mapping[str, Tensor], prefix: str, width: int, num_heads: int) -> dict[str, Any]:
    layers = {name.split(".resblocks.")[1].split(".")[0] for name in tensors if name.startswith(f"{prefix}resblocks.")}
    return {
        "hidden_size": width,
        "intermediate_size": tensors[f"{prefix}resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": num_heads,
        "hidden_act": "gelu",  # open_clip's own; OpenAI's models have quick_gelu
        "layer_norm_eps": 1e-5,
        "projection_dim": tensors["text_projection"].shape[1],
    }


_NAMES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
)
"""open_clip's names -> transformers'."""


def _renamed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All tensors under transformers' names; projections are transposed, and q, k, v taken apart."""
    for old, tensor in tensors.items():
        name = old
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace("in_proj_", f"{letter}_proj."), part.contiguous()
        elif old in ("visual.proj", "text_projection"):
            yield name, tensor.T.contiguous()
        else:
            yield name, tensor
