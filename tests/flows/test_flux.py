"""FLUX.1: a tiny random dev and a tiny random schnell do in our family what they do in FluxPipeline."""

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from lightning_fdfo.flows import Flux
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_files import add_lora, save_lora
from lightning_fdfo.testing.flow_checks import randomise
from tests.flows.tiny_models import random_weights
from tests.flows.tiny_tokenizers import clip_tokenizer, t5_tokenizer

NUM_TOKENS = 48
"""Fewer than the longest prompt has, more than the others have."""


def flux_folder(folder, variant):
    """A pipeline like `dev` or like `schnell`, at a VAE's factor of 4."""
    dev = variant == "dev"
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=dev, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=4,
        scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=16, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )  # fmt: skip
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(t5), d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2, is_gated_act=True)
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=random_weights(vae, 1),
        text_encoder=random_weights(text_encoder, 2),
        tokenizer=clip,
        text_encoder_2=random_weights(text_encoder_2, 3),
        tokenizer_2=t5,
        transformer=random_weights(transformer, 4),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["dev", "schnell"])
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def folder(folder_of, variant):
    return folder_of(f"flux {variant}")


@pytest.fixture(scope="module")
def loaded(loaded_flow, variant):
    return loaded_flow(f"flux {variant}")


def test_guidance_takes_no_negative_prompts(loaded):
    assert "negative_prompt" not in loaded.pipeline_call(3.5, ["blurry"])


def test_the_grid_of_dev_shifts_with_the_size(loaded, variant):
    small, large = (loaded.sigmas(4, size, size) for size in (64, 512))
    assert torch.equal(small, large) == (variant == "schnell")
    assert (large >= small).all()


def test_every_block_is_found(loaded):
    assert [type(block).__name__ for block in loaded.blocks] == ["FluxTransformerBlock"] + 2 * [
        "FluxSingleTransformerBlock"
    ]
    assert loaded.num_tokens(32, 48, loaded.encode(["a cat"])) == 4 * 6 + NUM_TOKENS


def test_a_lora_file_with_alphas_of_its_own_does_what_it_does_in_diffusers(folder, tmp_path):
    """Files of other trainers carry an alpha a layer, which diffusers' reader drops unless it is asked for."""
    flow = Flux(str(folder), max_sequence_length=NUM_TOKENS)
    flow.load()
    add_lora(flow, LoRA(rank=4, alpha=4), seed=0)
    randomise(flow.transformer)
    save_lora(flow, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    layers = sorted({name.partition(".lora_")[0] for name in tensors})
    alphas = {f"{layer}.alpha": torch.tensor(1.0 + index % 3) for index, layer in enumerate(layers)}
    save_file(tensors | alphas, path, metadata={"format": "pt"})

    plain = flow.load_pipeline()
    plain.load_lora_weights(tmp_path, weight_name=path.name)
    start = Flux(str(folder), max_sequence_length=NUM_TOKENS)
    start.load()
    add_lora(start, LoRA(rank=4, alpha=12, init_lora=str(path)), seed=0)
    ours, latents = start.transformer, torch.randn(2, *start.latent_shape(32, 48))
    conditioning, sigma = start.encode(["a cat", "two dogs"]), torch.tensor(0.5)
    with torch.no_grad():
        expected = start.velocity(latents, sigma, conditioning, 3.5)
        start.transformer = plain.transformer
        torch.testing.assert_close(start.velocity(latents, sigma, conditioning, 3.5), expected)
        ours.disable_adapters()
        start.transformer = ours
        assert (start.velocity(latents, sigma, conditioning, 3.5) - expected).abs().max() > 1e-2
