"""SANA: a tiny random model does in our family what it does in SanaPipeline, at Euler's steps."""

import inspect

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.sana import Sana
from tests.flows.tiny_models import random_weights
from tests.flows.tiny_tokenizers import WORDS, gemma_tokenizer

NUM_TOKENS = 32
"""Fewer than the longest prompt has, more than the others have."""
SIZE = (64, 96)
DPM = DPMSolverMultistepScheduler(
    use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", algorithm_type="dpmsolver++"
)
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def sana_folder(folder, scheduler=DPM, **options):
    """A pipeline with the VAE's factor of 32, and some options of the transformer."""
    gemma = gemma_tokenizer([*WORDS, *dict.fromkeys(" ".join(INSTRUCTION).split())])
    transformer = SanaTransformer2DModel(
        **{
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
            "caption_channels": 16, "sample_size": 32,
            **options,
        }
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=[8] * 6, decoder_block_out_channels=[8] * 6,
        encoder_layers_per_block=[1] * 6, decoder_layers_per_block=[1] * 6, encoder_qkv_multiscales=[[]] * 6,
        decoder_qkv_multiscales=[[]] * 6, scaling_factor=0.41407,
    )  # fmt: skip
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(gemma), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, pad_token_id=gemma.pad_token_id, bos_token_id=gemma.bos_token_id,
            eos_token_id=gemma.eos_token_id,
        )
    )  # fmt: skip
    SanaPipeline(
        tokenizer=gemma,
        text_encoder=random_weights(text_encoder, 1),
        vae=random_weights(vae, 2),
        transformer=random_weights(transformer, 3),
        scheduler=scheduler,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(loaded_flow):
    return loaded_flow("sana 1.0")


def test_the_solver_gives_way_to_euler(loaded):
    assert loaded.pipeline.scheduler.config.shift == DPM.config.flow_shift
    reference = FlowMatchEulerDiscreteScheduler(shift=3.0)
    reference.set_timesteps(6)
    assert torch.equal(loaded.sigmas(6, *SIZE), reference.sigmas)


def test_euler_stays_as_it_is(tmp_path):
    flow = Sana(str(sana_folder(tmp_path, FlowMatchEulerDiscreteScheduler(shift=5.0))))
    flow.load()
    assert flow.pipeline.scheduler.config.shift == 5.0
    assert type(flow.pipeline.scheduler) is FlowMatchEulerDiscreteScheduler


def test_a_solver_for_other_than_flows_is_refused(tmp_path):
    flow = Sana(str(sana_folder(tmp_path, DPMSolverMultistepScheduler())))
    with pytest.raises(ConfigurationError, match="DPMSolverMultistepScheduler, expected a FlowMatchEuler"):
        flow.load()


def test_the_instruction_stands_before_prompts_alone(loaded):
    own = loaded.pipeline
    both = loaded.encode(["a cat"], ["a cat"]).tensors
    prompt, mask, negative, negative_mask = own.encode_prompt(
        ["a cat"], negative_prompt=["a cat"], max_sequence_length=NUM_TOKENS, complex_human_instruction=INSTRUCTION
    )
    torch.testing.assert_close(both["prompt_embeds"], prompt)
    torch.testing.assert_close(both["negative_prompt_embeds"], negative)
    assert torch.equal(both["prompt_attention_mask"], mask)
    assert torch.equal(both["negative_prompt_attention_mask"], negative_mask)
    assert (prompt[:, 1] - negative[:, 1]).abs().max() > 0.1


def test_a_latent_pixel_is_a_token(loaded):
    assert loaded.latent_shape(*SIZE) == (4, 2, 3)
    assert loaded.num_tokens(*SIZE, loaded.encode(["a cat"])) == 2 * 3  # blocks look at the text from aside
    assert loaded.width == 16
    with pytest.raises(ConfigurationError, match="multiples of 32, got 64 x 80"):
        loaded.latent_shape(64, 80)
