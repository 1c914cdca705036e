"""FLUX.2: tiny random kleins and a tiny random dev do in our family what they do in their pipelines."""

from functools import partial

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
from lightning_fdfo.flows.flux2 import Flux2
from lightning_fdfo.testing import check_flow_model
from tests.flows.qwen_tokenizer import qwen_tokenizer
from tests.flows.tiny_models import check_cached_texts, check_missing_tensor, check_outline, effects, random_weights

GUIDANCE = {"klein-base": "classifier-free", "klein": "none", "dev": "embedded"}
NUM_TOKENS = 48
"""Fewer than the longest prompt has, more than the others have."""
SIZE = (16, 24)
adapter = partial(Flux2, max_sequence_length=NUM_TOKENS)
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
def folder(tmp_path_factory, variant):
    return flux2_folder(tmp_path_factory.mktemp(variant), variant)


@pytest.fixture(scope="module")
def loaded(folder):
    flow = adapter(str(folder))
    flow.load()
    return flow


def test_it_does_what_the_pipeline_does(folder):
    check_flow_model(adapter(str(folder)))


def test_the_tiny_model_sees_its_inputs(loaded, variant):
    seen = effects(loaded, SIZE)
    guidance = seen.pop("guidance")
    assert min(seen.values()) > 0.01, seen
    assert (guidance > 0.01) == (variant != "klein")


def test_guidance_is_the_models_own(loaded, variant):
    assert loaded.guidance == GUIDANCE[variant]


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


def test_in_bfloat16_the_velocity_is_float32(folder):
    flow = adapter(str(folder), dtype="bfloat16")
    flow.load()
    with torch.no_grad():
        texts = flow.encode(["a cat", "two dogs"], ["", "blurry, and far too dark"])
        velocity = flow.velocity(torch.randn(2, *flow.latent_shape(*SIZE)), torch.tensor(0.5), texts, 4.0)
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()
    assert texts.tensors["prompt_embeds"].dtype == torch.bfloat16


def test_cached_texts_give_the_same_images(folder, tmp_path, monkeypatch):
    check_cached_texts(adapter, folder, SIZE, tmp_path / "texts", monkeypatch)


def test_what_is_known_before_it_is_loaded(folder, tmp_path):
    check_outline(adapter(str(folder)), SIZE)
    check_missing_tensor(adapter, folder, tmp_path / "copy")
