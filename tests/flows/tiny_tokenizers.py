"""Tokenizers that know a few words, and any other text letter by letter; `save_pretrained` writes them as a hub's."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, GemmaTokenizer, T5Tokenizer

WORDS = ("a", "cat", "two", "dogs", "sign", "above", "door")


def clip_tokenizer(words: Sequence[str] = WORDS, max_length: int = 77) -> CLIPTokenizer:
    """Pads to `max_length`; the end of a text is the last token, where CLIP looks for it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = _trie(
        [*letters, *(f"{letter}</w>" for letter in letters)], [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    )
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def t5_tokenizer(words: Sequence[str] = WORDS) -> T5Tokenizer:
    """`<pad>` is 0, `</s>` 1; a letter that is not ASCII is `<unk>`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
    pieces += [(letter, -5.0) for letter in _printable()]
    pieces += [(f"▁{word}", -1.0) for word in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def gemma_tokenizer(words: Iterable[str] = WORDS) -> GemmaTokenizer:
    """Starts with `<bos>`; a letter that is not ASCII is its bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", *_printable()]
    vocabulary, merges = _trie(letters, [f"▁{word}" for word in words])
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def _printable() -> list[str]:
    return [letter for letter in string.printable if not letter.isspace()]


def _trie(letters: Iterable[str], words: Iterable[Sequence[str]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE's vocabulary and merges that join each word from its front."""
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        front = word[0]
        for letter in word[1:]:
            merges[front, letter] = None
            front += letter
            vocabulary.setdefault(front, len(vocabulary))
    return vocabulary, list(merges)
