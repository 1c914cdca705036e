"""Small random models in the hub's folder layout, as the rewards would fetch them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "rewards"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - it is no mapping


def golden_images(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Its images, [1, 3, H, W] in [0, 1] each, of several sizes."""
    return [tensors[f"image_{index}"][None].float() / 255 for index in range(5)]


def faint(name: str, folder: Path) -> tuple[Path, Tensor]:
    """The golden checkpoint with faint embeddings, and the scores that the package gave for it.

    Embeddings times 2^-10 make the variances small that layer norms divide by: their epsilon shows in the scores.
    """
    prefixes = {
        "hpsv2": (
            "visual.class_embedding",
            "visual.positional_embedding",
            "visual.conv1.",
            "token_emb",
            "positional_emb",
        ),
        "image_reward": tuple(f"blip.visual_encoder.{part}" for part in ("cls_token", "pos_embed", "patch_embed.")),
    }
    saved = torch.load(GOLDEN / f"{name}_public.pt", weights_only=True)
    tensors = saved.get("state_dict", saved)
    for key in tensors:
        if key.startswith(prefixes[name]):
            tensors[key] = tensors[key] * 2.0**-10
    torch.save(saved, folder / "faint.pt")
    return folder / "faint.pt", load_file(GOLDEN / "faint_scores.safetensors")[name]


def byte_level(words: list[str], prefix_space: bool, end: str = "", num_tokens: int | None = None) -> Tokenizer:
    """A byte-level BPE that knows every text, and some words as one token; its two last tokens may be CLIP's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    closed = [letter + end for letter in letters if end]
    vocabulary = {letter: number for number, letter in enumerate([*letters, *closed])}
    merges = []
    for word in words:
        known = word[0]
        for letter in word[1:]:
            merges.append((known, letter))
            known += letter
            vocabulary.setdefault(known, len(vocabulary))
    if num_tokens is not None:
        vocabulary |= {"<|startoftext|>": num_tokens - 2, "<|endoftext|>": num_tokens - 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **({"end_of_word_suffix": end} if end else {})))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def clip_tokenizer(folder: Path, num_tokens: int | None = None) -> int:
    """Writes a tokenizer in CLIP's manner, and returns its number of tokens; the last is the end of a text."""
    raw = byte_level(["cat", "dog"], prefix_space=False, end="</w>", num_tokens=num_tokens)
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        model_max_length=77,
    )  # fmt: skip
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", bos), ("<|endoftext|>", eos)]
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def clip_folder(folder: Path, image_size: int = 32) -> Path:
    """A CLIPModel with its tokenizer and image processor."""
    num_tokens = clip_tokenizer(folder)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **tower, "vocab_size": num_tokens, "max_position_embeddings": 77, "eos_token_id": num_tokens - 1,
            "bos_token_id": num_tokens - 2, "pad_token_id": num_tokens - 1,
        },
        vision_config={**tower, "image_size": image_size, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():  # as they come from the constructor, towers hardly see their input
        torch.nn.init.normal_(parameter, std=0.1)
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    size = {"shortest_edge": image_size}
    CLIPImageProcessorPil(size=size, crop_size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return folder


def aesthetic_head(file: Path, width: int = 16) -> Path:
    """A head in the official format."""
    sizes, generator = [width, 24, 12, 8, 4, 1], torch.Generator().manual_seed(1)
    tensors = {}
    for number, takes, gives in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        tensors[f"layers.{number}.weight"] = torch.randn(gives, takes, generator=generator)
        tensors[f"layers.{number}.bias"] = torch.randn(gives, generator=generator)
    torch.save(tensors, file)
    return file


def bert_tokenizer(folder: Path, vocabulary: str) -> Path:
    """A WordPiece tokenizer from a vocabulary, a word a line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def image_reward_files(folder: Path) -> dict[str, Any]:
    """Options with which ImageReward loads the golden checkpoint."""
    _, metadata = golden("image_reward_public")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "med_config.json").write_text(metadata["med_config"])
    return {
        "checkpoint": str(GOLDEN / "image_reward_public.pt"),
        "config": str(folder / "med_config.json"),
        "tokenizer": str(bert_tokenizer(folder / "tokenizer", metadata["vocab"])),
        "num_heads": json.loads(metadata["vision"])["num_attention_heads"],
    }


def qwen_folder(folder: Path, generation: int) -> Path:
    """A model in the manner of Qwen2.5-VL (generation 2) or Qwen3-VL (3), with tokenizer and image processor."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["Yes", "No"], prefix_space=False), pad_token="<|endoftext|>",
        additional_special_tokens=[
            "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
        ],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, start, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    tokens = {
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    if generation == 2:
        vision |= {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
        processor = Qwen2VLImageProcessorPil()
    else:
        vision |= {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))
        processor = Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
