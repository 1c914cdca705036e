"""A tokenizer like Qwen's, that knows the words of a text, and any other text byte by byte."""

from __future__ import annotations

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>{% endif %}{% endif %}"
)


def qwen_tokenizer(text: str = "a cat, two dogs, a sign above the door") -> Qwen2Tokenizer:
    """Saves and loads like a hub's, chat template included."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [text],
        vocab_size=1000,
        new_special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
