"""check_flow_model: a made-up pipeline passes, and each check turns red for a fault of its own."""

import inspect
import re
from contextlib import contextmanager

import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict

from lightning_fdfo.flows import DiffusersFlow, StableDiffusion3
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.testing import ConformanceError, check_flow_model, flow_checks
from lightning_fdfo.testing.flow_checks import CHECKS, run_flow_checks
from tests.testing import postcards
from tests.testing.postcards import Postcard, postcard_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(postcard_folder(tmp_path_factory.mktemp("postcards")))


def test_an_family_for_a_made_up_pipeline_passes(folder):
    check_flow_model(Postcard(folder))


def test_it_is_short():
    family = inspect.getsource(postcards).partition("# The family begins here")[2]
    assert len(family.strip().splitlines()) <= 80


def test_pretrained_alone_finds_it(folder):
    assert type(DiffusersFlow(folder)) is Postcard


class Tiny(StableDiffusion3):
    def __init__(self):
        super().__init__("tiny-digits", max_sequence_length=0)


class RegistersTheVAE(Tiny):
    def load(self):
        super().load()
        self.vae = self.pipeline.vae


class LeavesWeightsOn(Tiny):
    def load(self):
        super().load()
        self.transformer.requires_grad_(True)


class NeedsItsEncodersThere(Tiny):
    """Encodes while they are on the device, and not otherwise: no fault."""

    open = False

    @contextmanager
    def encoding(self):
        self.open = True
        yield
        self.open = False

    def encode_texts(self, pipeline, texts, device, negative):
        assert self.open
        return super().encode_texts(pipeline, texts, device, negative)


def test_texts_are_encoded_where_the_encoders_are():
    check_flow_model(NeedsItsEncodersThere(), num_steps=1)


class OtherGrid(Tiny):
    def grid(self, num_steps, num_tokens):
        return {"sigmas": [1 - k / (num_steps + 1) for k in range(num_steps)]}


class ForgetsRows(Tiny):
    def encode_texts(self, pipeline, texts, device, negative):
        tensors = super().encode_texts(pipeline, texts, device, negative)
        return tensors | {"pooled_prompt_embeds": tensors["pooled_prompt_embeds"][:1]}


class ForgetsTheMask(Tiny):
    """Pads to the batch's longest text, and lets the model look at the padding."""

    def encode_texts(self, pipeline, texts, device, negative):
        tensors = super().encode_texts(pipeline, texts, device, negative)
        longest = max(len(text) for text in texts)
        return tensors | {"prompt_embeds": tensors["prompt_embeds"][:, : longest // 2]}


class SeesTheBatch(Tiny):
    def predict(self, latents, sigma, tensors, guidance_scale):
        return super().predict(latents, sigma.mean().expand(len(sigma)), tensors, guidance_scale)


class DecodesBeyond(Tiny):
    def decode(self, latents):
        return self.pipeline.vae.decode(self.unscale(latents), return_dict=False)[0]


class OtherScale(Tiny):
    def unscale(self, latents):
        return super().unscale(1.1 * latents)


class OtherGuidance(Tiny):
    def guide(self, negative, positive, guidance_scale):
        return positive + guidance_scale * (positive - negative)


class BindsWhatDoesNothing(Tiny):
    """Text tokens' last output leads nowhere."""

    lora_targets = ("transformer_blocks.3.attn.add_q_proj",)

    def velocity(self, latents, sigma, conditioning, guidance_scale=1.0):
        tensors = conditioning.tensors | {"prompt_embeds": 0 * conditioning.tensors["prompt_embeds"]}
        return 0 * super().velocity(latents, sigma, Conditioning(tensors), guidance_scale) + latents


class LeavesWeightsOut(Tiny):
    """What the text's first projection gives is thrown away."""

    lora_targets = ("context_embedder", "attn.to_q")

    def predict(self, latents, sigma, tensors, guidance_scale):
        embed = self.transformer.context_embedder.forward
        self.transformer.context_embedder.forward = lambda text: embed(text).detach()
        try:
            return super().predict(latents, sigma, tensors, guidance_scale)
        finally:
            self.transformer.context_embedder.forward = embed


class MergesTheLoRA(Tiny):
    """Turning it off does not bring the base model back."""

    def load(self):
        super().load()
        weight = self.transformer.proj_out.weight
        original = self.transformer.disable_adapters

        def disable():
            original()
            weight.data += 1e-3

        self.transformer.disable_adapters = disable


def save_without_alpha(flow, folder):
    """Writes B as it trains, of a LoRA whose scale is 3."""
    flow.pipeline.save_lora_weights(folder, get_peft_model_state_dict(flow.transformer))


def save_alpha_in_metadata(flow, folder):
    """Right where that is read, and nowhere else."""
    metadata = _collate_lora_metadata({"transformer": flow.transformer})
    flow.pipeline.save_lora_weights(folder, get_peft_model_state_dict(flow.transformer), **metadata)


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (RegistersTheVAE, r"loads.*it registers \['transformer', 'vae'\]"),
        (LeavesWeightsOn, "loads.*weights train"),
        (OtherGrid, "has the pipeline's grid.*the pipeline has"),
        (ForgetsRows, "encodes to conditioning.*expected 3 rows"),
        (ForgetsTheMask, "encodes to conditioning.*prompts encoded one by one"),
        (SeesTheBatch, "gives in a batch the velocities"),
        (DecodesBeyond, "decodes to finite.*clamp"),
        (OtherScale, "generates, without churn.*pixels differ.*guidance 1.0"),
        (OtherGuidance, "generates, without churn.*pixels differ.*guidance 3.0"),
        (BindsWhatDoesNothing, "takes a LoRA.*leaves the velocity as it was"),
        (LeavesWeightsOut, "takes a LoRA.*2 of its weights have no gradient"),
        (MergesTheLoRA, "takes a LoRA.*with the LoRA turned off"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_each_check_turns_red(flow, message):
    with pytest.raises(ConformanceError) as error:
        check_flow_model(flow(), num_steps=3)
    assert re.search(message, str(error.value).replace("\n", " ")), error.value


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_without_alpha, "exports the LoRA.*is the scale, alpha / rank, in the weights"),
        (save_alpha_in_metadata, "exports the LoRA.*alpha that is not the rank"),
    ],
)
def test_a_file_that_loses_the_scale_turns_the_last_check_red(save, message, monkeypatch):
    monkeypatch.setattr(flow_checks, "save_lora", save)
    with pytest.raises(ConformanceError) as error:
        check_flow_model(Tiny(), num_steps=3)
    assert re.search(message, str(error.value).replace("\n", " ")), error.value


def test_every_check_is_run():
    results = list(run_flow_checks(Tiny(), num_steps=2))
    assert [result.problem for result in results] == [None] * len(CHECKS)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    check_flow_model(Tiny(), num_steps=1)
    assert torch.equal(torch.get_rng_state(), before)
