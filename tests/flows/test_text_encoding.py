"""Where texts are encoded: by encoders that stay, that come and go, or once into a cache."""

import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from lightning_fdfo import Batching, FDFOModule, LoRA, Sampling
from lightning_fdfo.flows import Flux, StableDiffusion3, resolve_pretrained, text_cache
from lightning_fdfo.flows.diffusers_flow import DiffusersFlow
from lightning_fdfo.flows.text_encoding import TEXTS_A_SHARD
from lightning_fdfo.reward.term import RewardTerm
from tests.conftest import brightness
from tests.flows.test_flux import NUM_TOKENS, flux_folder

PROMPTS = ['"427" in red', '"1234" in blue', '"8"']


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_a_model_without_classifier_free_guidance_encodes_no_negative_prompts(variant, tmp_path, fit, monkeypatch):
    """Its guidance is an input, or there is none, which is known before any text is encoded."""
    given, encode_texts = [], Flux.encode_texts

    def watched(self, pipeline, texts, device, negative):
        given.append(negative)
        return encode_texts(self, pipeline, texts, device, negative)

    monkeypatch.setattr(Flux, "encode_texts", watched)
    module = FDFOModule(
        Flux(
            str(flux_folder(tmp_path / variant, variant)),
            max_sequence_length=NUM_TOKENS,
            text_encoders="cache",
            text_cache=str(tmp_path / "texts"),
        ),
        {"brightness": RewardTerm(brightness)},
        sampling=Sampling(
            num_steps=2, height=32, width=48, churn=0.1, guidance_scale={"dev": 3.5, "schnell": 1.0}[variant]
        ),
        batching=Batching(num_pairs=2, updates_per_epoch=1, batch_size=4),
        lora=LoRA(rank=2, alpha=2),
    )
    fit(module, 1)
    assert given
    assert not any(given)


# What it depends on


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(resolve_pretrained("tiny-digits"), tmp_path / "model"))


def fingerprints(tmp_path):
    return {path.name for path in (tmp_path / "texts").iterdir()} if (tmp_path / "texts").exists() else set()


def fill(folder, tmp_path, **options):
    """Encodes one text; returns how many caches there are now."""
    settings = {"max_sequence_length": 0, "text_encoders": "cache", "text_cache": str(tmp_path / "texts")}
    flow = StableDiffusion3(str(folder), **(settings | options))
    flow.load()
    flow.prepare_texts(PROMPTS[:1], [], torch.device("cpu"))
    return len(fingerprints(tmp_path))


def test_what_encoded_texts_depend_on_makes_a_new_cache(folder, tmp_path, monkeypatch):
    assert fill(folder, tmp_path) == 1
    assert fill(folder, tmp_path) == 1
    assert fill(folder, tmp_path, max_sequence_length=4) == 2
    assert fill(folder, tmp_path, dtype="bfloat16") == 3
    for count, part in enumerate(("tokenizer/tokenizer_config.json", "text_encoder_2/config.json"), start=4):
        file = folder / part
        file.write_text(file.read_text() + "\n")
        assert fill(folder, tmp_path) == count
    weights = folder / "text_encoder" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1  # of the same length
    weights.write_bytes(changed)
    assert fill(folder, tmp_path) == 6
    monkeypatch.setattr(text_cache, "version", lambda name: "99")
    assert fill(folder, tmp_path) == 7


def test_what_they_do_not_depend_on_does_not(folder, tmp_path):
    assert fill(folder, tmp_path) == 1
    for part in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        (folder / part).write_text((folder / part).read_text() + "\n")
    os.utime(folder / "text_encoder" / "model.safetensors")
    moved = folder.rename(folder.with_name("moved"))
    assert fill(moved, tmp_path, vae_slicing=True, gradient_checkpointing=True) == 1


def test_of_a_large_file_size_and_time_count(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache, "SMALL", 1000)
    assert fill(folder, tmp_path) == 1
    os.utime(folder / "transformer" / "diffusion_pytorch_model.safetensors", (1, 1))
    assert fill(folder, tmp_path) == 1
    os.utime(folder / "text_encoder" / "model.safetensors", (1, 1))
    assert fill(folder, tmp_path) == 2


# In a flow


@pytest.fixture
def cached(tmp_path):
    def build(**options):
        settings = {"max_sequence_length": 0, "text_encoders": "cache", "text_cache": str(tmp_path / "texts")}
        return StableDiffusion3("tiny-digits", **(settings | options))

    return build


@pytest.fixture
def loads(monkeypatch):
    """The parts that each call of `load_pipeline` left out."""
    calls, load_pipeline = [], DiffusersFlow.load_pipeline

    def counted(self, **parts):
        calls.append(set(parts))
        return load_pipeline(self, **parts)

    monkeypatch.setattr(DiffusersFlow, "load_pipeline", counted)
    return calls


WITHOUT_MODEL = {"transformer", "vae"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_texts_are_those_of_the_encoders(cached, dtype):
    keep, flow = cached(dtype=dtype, text_encoders="keep"), cached(dtype=dtype)
    for each in (keep, flow):
        each.load()
    flow.prepare_texts(PROMPTS, ["", "blue", "red"], torch.device("cpu"))
    with torch.no_grad():
        expected, alone = keep.encode(PROMPTS, ["", "blue", "red"]).tensors, keep.encode(PROMPTS[1:2], [""]).tensors
    read = flow.encode(PROMPTS, ["", "blue", "red"]).tensors
    assert set(read) == set(expected)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    tolerance = 1e-5 if dtype == "float32" else 0.05  # of another batch size
    for name, tensor in flow.encode(PROMPTS[1:2], [""]).tensors.items():
        torch.testing.assert_close(tensor, alone[name], rtol=tolerance, atol=tolerance)


def test_encoders_are_freed_once_all_is_cached_and_not_loaded_by_the_next_run(cached, loads, monkeypatch):
    encoders, encode_texts = [], StableDiffusion3.encode_texts

    def watched(self, pipeline, *arguments):
        encoders.append(weakref.ref(pipeline.text_encoder))
        return encode_texts(self, pipeline, *arguments)

    monkeypatch.setattr(StableDiffusion3, "encode_texts", watched)
    first = cached()
    first.load()
    assert first.pipeline.text_encoder is None
    first.prepare_texts(PROMPTS, [""], torch.device("cpu"))
    gc.collect()
    assert len(encoders) == 2
    assert encoders[0]() is None
    first.encode(PROMPTS, [""] * 3)
    second = cached()
    second.load()
    second.prepare_texts(PROMPTS, ["", ""], torch.device("cpu"))
    second.encode(PROMPTS, [""] * 3)
    assert len(encoders) == 2
    assert [parts == WITHOUT_MODEL for parts in loads] == [False, True, False]


def test_a_text_that_nobody_told_of_is_encoded_when_it_comes(cached, loads):
    flow = cached()
    flow.load()
    flow.prepare_texts(PROMPTS[:1], [], torch.device("cpu"))
    flow.encode(PROMPTS)
    flow.encode(PROMPTS)
    assert [parts == WITHOUT_MODEL for parts in loads] == [False, True, True]


def test_negative_prompts_have_a_cache_of_their_own(cached, tmp_path):
    flow = cached()
    flow.load()
    flow.prepare_texts(["a"], ["a"], torch.device("cpu"))
    assert len(shards(tmp_path / "texts")) == len(fingerprints(tmp_path)) == 2


def test_texts_are_encoded_in_shards_each_once(cached, tmp_path):
    flow, texts = cached(), [f'"{n % (TEXTS_A_SHARD + 5)}"' for n in range(100)]
    flow.load()
    flow.prepare_texts(texts, [], torch.device("cpu"))
    keys = [key for path in shards(tmp_path / "texts") for key in read_keys(path)]
    assert len(keys) == len(set(keys)) == TEXTS_A_SHARD + 5
    assert len(shards(tmp_path / "texts")) == 2


def read_keys(path):
    with text_cache.safe_open(path, framework="pt") as shard:
        return json.loads(shard.metadata()["keys"])


def test_images_are_those_of_encoders_that_stay(cached):
    flow, keep = cached(), cached(text_encoders="keep")
    latents = torch.randn(3, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for each in (flow, keep):
        each.load()
        with torch.no_grad():
            results.append(each.velocity(latents, torch.tensor(0.5), each.encode(PROMPTS, ["", "a", "b"]), 2.0))
    assert torch.equal(*results)


def test_an_adapter_that_is_written_anew_encodes_anew(tmp_path):
    """Two classes of one name, as before and after an edit."""

    def adapter(factor):
        if factor == 1:

            class Mine(StableDiffusion3):
                def encode_texts(self, pipeline, texts, device, negative):
                    return super().encode_texts(pipeline, texts, device, negative)
        else:

            class Mine(StableDiffusion3):
                def encode_texts(self, pipeline, texts, device, negative):
                    tensors = super().encode_texts(pipeline, texts, device, negative)
                    return {name: 2 * value for name, value in tensors.items()}

        return Mine("tiny-digits", max_sequence_length=0, text_encoders="cache", text_cache=str(tmp_path))

    first, second = (adapter(factor).encode(["a"]).tensors["prompt_embeds"] for factor in (1, 2))
    torch.testing.assert_close(second, 2 * first)


def test_a_cache_that_is_deleted_is_filled_again(tmp_path):
    options = {"max_sequence_length": 0, "text_encoders": "cache", "text_cache": str(tmp_path / "texts")}
    flow = StableDiffusion3("tiny-digits", **options)
    before = flow.encode(["a"]).tensors["prompt_embeds"]
    shutil.rmtree(tmp_path / "texts")
    assert torch.equal(flow.encode(["a"]).tensors["prompt_embeds"], before)
