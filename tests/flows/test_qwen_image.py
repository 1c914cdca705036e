"""Qwen-Image: a tiny random model does in our family what it does in QwenImagePipeline."""

from functools import partial

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.latents import pack
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_files import add_lora
from lightning_fdfo.flows.qwen_image import QwenImage
from tests.flows.qwen_tokenizer import qwen_tokenizer
from tests.flows.tiny_models import random_weights

NUM_TOKENS = 48
"""Fewer than the longest prompt has, more than the others have."""
SIZE = (16, 24)
SYSTEM = """<|im_start|>system
Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects \
and background:<|im_end|>
<|im_start|>user
"""
"""What the pipeline puts before a prompt, and takes out again by its number of tokens, 34."""


def qwen_image_folder(folder):
    """A pipeline at a VAE's factor of 2."""
    tokenizer = qwen_tokenizer(SYSTEM + "assistant a cat two dogs")
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[0.7, 1.3, 0.9, 1.1],
    )  # fmt: skip
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
            },
        )
    )  # fmt: skip
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9),
        vae=random_weights(vae, 1),
        text_encoder=random_weights(text_encoder, 2),
        tokenizer=tokenizer,
        transformer=random_weights(transformer, 3, gain=2.0),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(folder_of):
    return folder_of("qwen image")


@pytest.fixture(scope="module")
def loaded(loaded_flow):
    return loaded_flow("qwen image")


def test_the_tiny_tokenizer_has_the_systems_message_in_34_tokens(loaded):
    own = loaded.pipeline
    assert own.prompt_template_encode.startswith(SYSTEM)
    assert len(own.tokenizer(SYSTEM).input_ids) == own.prompt_template_encode_start_idx
    assert loaded.encode(["a cat"]).tensors["prompt_embeds"].shape[1] == len(
        own.tokenizer("a cat<|im_end|>\n<|im_start|>assistant\n").input_ids
    )


def test_there_is_always_a_mask(loaded):
    for prompts in (["a cat"], ["a cat", "a cat"], ["a cat", "two dogs and one cat"]):
        mask = loaded.encode(prompts).tensors["prompt_embeds_mask"]
        assert mask.dtype == torch.bool
        assert mask.all() == (len(set(prompts)) == 1)


def test_padding_that_no_text_needs_costs_nothing_and_changes_nothing(loaded, monkeypatch):
    one = loaded.encode(["a cat"])
    long = loaded.encode(["two dogs above the door, and a cat below"])
    padded = Conditioning.cat([one, long])[[0]]
    assert len(padded.tensors["prompt_embeds"][0]) > len(one.tensors["prompt_embeds"][0])
    given = []
    forward = loaded.transformer.forward

    def spy(**arguments):
        given.append(arguments)
        return forward(**arguments)

    monkeypatch.setattr(loaded.transformer, "forward", spy)
    latents, sigma = torch.randn(1, *loaded.latent_shape(*SIZE)), torch.tensor(0.5)
    with torch.no_grad():
        assert torch.equal(loaded.velocity(latents, sigma, padded), loaded.velocity(latents, sigma, one))
    assert [call["encoder_hidden_states_mask"] for call in given] == [None, None]


def test_guidance_keeps_the_norm_of_each_token(loaded):
    generator = torch.Generator().manual_seed(0)
    negative, positive = torch.randn(2, 3, 4, 8, 12, generator=generator)
    guided = pack(loaded.guide(negative, positive, 4.0))
    torch.testing.assert_close(guided.norm(dim=-1), pack(positive).norm(dim=-1))
    plain = pack(negative + 4 * (positive - negative))
    torch.testing.assert_close(torch.cosine_similarity(guided, plain, dim=-1), torch.ones(3, 24))
    torch.testing.assert_close(loaded.guide(positive, positive, 4.0), positive)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_every_weight_has_a_gradient_as_ddp_wants(folder, gradient_checkpointing):
    flow = QwenImage(str(folder), gradient_checkpointing=gradient_checkpointing)
    flow.load()
    flow.load()
    assert len(flow.blocks[-1]._forward_hooks) == 1
    texts = flow.encode(["a cat", "two dogs and one cat"])
    latents = torch.randn(2, *flow.latent_shape(*SIZE))
    for prepare in (flow.train_all, partial(add_lora, flow, LoRA(rank=2), seed=0)):
        prepare()
        flow.velocity(latents, torch.tensor(0.5), texts).square().mean().backward()
        assert [name for name, p in flow.named_parameters() if p.requires_grad and p.grad is None] == []


def test_sizes_that_do_not_fit_are_refused(loaded):
    assert loaded.latent_shape(*SIZE) == (4, 8, 12)
    assert loaded.num_tokens(*SIZE, loaded.encode(["a cat"])) > 4 * 6
    assert loaded.width == 32
    with pytest.raises(ConfigurationError, match="multiples of 4, got 16 x 22"):
        loaded.latent_shape(16, 22)
