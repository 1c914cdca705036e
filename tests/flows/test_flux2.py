"""FLUX.2: tiny random kleins and a tiny random dev do in our family what they do in their pipelines."""

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from lightning_fdfo.errors import ConfigurationError
from tests.flows.qwen_tokenizer import qwen_tokenizer
from tests.flows.tiny_models import random_weights

GUIDANCE = {"klein-base": "classifier-free", "klein": "none", "dev": "embedded"}
NUM_TOKENS = 48
"""Fewer than the longest prompt has, more than the others have."""
SIZE = (16, 24)
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
DEV_TEMPLATE = "{% for c in messages[-1].content %}{{ c.text }}{% endfor %}"
"""Leaves the system's message out."""


def klein_texts():
    """Qwen3 and its tokenizer; its 9th, 18th and 27th layers are what the transformer sees."""
    tokenizer = qwen_tokenizer()
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=28, **TEXT)), tokenizer


def dev_texts():
    """Mistral 3 and its tokenizer; its 10th, 20th and 30th layers are what the transformer sees.

    The tokenizer stands in for the processor around it, which would want torchvision; a text goes through both alike.
    """
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = DEV_TEMPLATE
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": len(tokenizer), "num_hidden_layers": 31, **TEXT},
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "head_dim": 8, "image_size": 16, "patch_size": 4,
        },
    )  # fmt: skip
    return Mistral3ForConditionalGeneration(config), tokenizer


def flux2_folder(folder, variant):
    """A pipeline at a VAE's factor of 2."""
    text_encoder, tokenizer = dev_texts() if variant == "dev" else klein_texts()
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 16, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=variant == "dev",
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    vae.bn.running_mean.normal_(generator=generator)
    vae.bn.running_var.uniform_(0.2, 3.0, generator=generator)
    pipeline_class, options = Flux2Pipeline, {}
    if variant != "dev":
        pipeline_class, options = Flux2KleinPipeline, {"is_distilled": variant == "klein"}
    pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=random_weights(vae, 1),
        text_encoder=random_weights(text_encoder, 2),
        tokenizer=tokenizer,
        transformer=random_weights(transformer, 3, gain=2.0),
        **options,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=GUIDANCE)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(loaded_flow, variant):
    return loaded_flow(f"flux2 {variant}")


def test_negative_prompts_come_encoded_where_they_are_used(loaded, variant):
    call = loaded.pipeline_call(3.0, ["blurry"])
    assert ("negative_prompt_embeds" in call) == (variant == "klein-base")
    if variant == "klein-base":
        expected = loaded.encode(["a cat"], ["blurry"]).tensors["negative_prompt_embeds"]
        assert torch.equal(call["negative_prompt_embeds"], expected)
    assert "negative_prompt_embeds" not in loaded.pipeline_call(1.0, None)


def test_a_latent_pixel_is_a_token(loaded):
    assert loaded.latent_shape(*SIZE) == (16, 4, 6)
    assert loaded.num_tokens(*SIZE, loaded.encode(["a cat"])) == 4 * 6 + NUM_TOKENS
    assert loaded.width == 32
    with pytest.raises(ConfigurationError, match="multiples of 4, got 16 x 22"):
        loaded.latent_shape(16, 22)


def test_patches_become_pixels_as_in_the_pipeline(loaded):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 4, 6, generator=generator)
    norm = loaded.pipeline.vae.bn
    scaled = latents * (norm.running_var + 1e-4).sqrt()[:, None, None] + norm.running_mean[:, None, None]
    torch.testing.assert_close(loaded.unscale(latents), loaded.pipeline._unpatchify_latents(scaled))


def test_the_grid_shifts_with_size_and_steps(loaded):
    small, large = (loaded.sigmas(4, size, size) for size in (16, 512))
    assert (large[1:-1] > small[1:-1]).all()
    assert loaded.sigmas(8, 16, 16)[4] != small[2]
