"""Z-Image: a tiny random model does in our family what it does in ZImagePipeline."""

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.conditioning import Conditioning
from tests.flows.qwen_tokenizer import qwen_tokenizer
from tests.flows.tiny_models import random_weights

NUM_TOKENS = 64
"""Fewer than the longest prompt has, more than the others have, and twice what the transformer fills texts up to."""
SIZE = (16, 24)


def z_image_folder(folder, scheduler):
    """A pipeline at a VAE's factor of 2."""
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[128, 16, 16],
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=4,
        scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=3, head_dim=8,
            num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    ZImagePipeline(
        scheduler=scheduler,
        vae=random_weights(vae, 1),
        text_encoder=random_weights(text_encoder, 2),
        tokenizer=tokenizer,
        transformer=random_weights(transformer, 3),
    ).save_pretrained(folder)
    return folder


TURBO = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.fixture(scope="module")
def loaded(loaded_flow):
    return loaded_flow("z_image turbo")


def test_guidance_is_the_cards_number_plus_one(loaded):
    negative, positive = torch.randn(2, 3, 4, 8, 12)
    card = 4.0
    torch.testing.assert_close(
        loaded.guide(negative, positive, card + 1), positive + card * (positive - negative), rtol=0, atol=1e-5
    )
    assert loaded.pipeline_call(1.0, None)["guidance_scale"] == 0


def test_texts_keep_their_lengths_through_padding(loaded, monkeypatch):
    prompts = ["a cat", "two dogs above the door, and a cat below, at night", "a sign"]
    own, _ = loaded.pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=NUM_TOKENS
    )
    texts = loaded.encode(prompts)
    assert texts.tensors["prompt_embeds_mask"].dtype == torch.bool
    assert texts.tensors["prompt_embeds_mask"].sum(1).tolist() == [len(text) for text in own]
    alone = Conditioning.cat([loaded.encode([prompt]) for prompt in prompts])
    given = []
    forward = loaded.transformer.forward
    monkeypatch.setattr(loaded.transformer, "forward", lambda **options: given.append(options) or forward(**options))
    with torch.no_grad():
        loaded.velocity(torch.randn(3, *loaded.latent_shape(*SIZE)), torch.tensor(0.5), alone)
    for text, expected in zip(given[0]["cap_feats"], own, strict=True):
        torch.testing.assert_close(text, expected)


def test_the_callers_texts_stay_as_they_are(loaded):
    texts = ["a cat"]
    loaded.encode_texts(loaded.pipeline, texts, torch.device("cpu"), False)
    assert texts == ["a cat"]


def test_blocks_and_tokens_are_counted(loaded):
    assert len(loaded.blocks) == 1 + 1 + 2
    assert loaded.width == 32
    assert loaded.num_tokens(*SIZE, loaded.encode(["a cat"])) > 4 * 6


def test_sizes_that_do_not_fit_are_refused(loaded):
    assert loaded.latent_shape(*SIZE) == (4, 8, 12)
    with pytest.raises(ConfigurationError, match="multiples of 4, got 16 x 22"):
        loaded.latent_shape(16, 22)
