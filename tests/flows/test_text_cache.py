import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import StableDiffusion3, resolve_pretrained, text_cache
from lightning_fdfo.flows.base import Conditioning
from lightning_fdfo.flows.diffusers_flow import TEXTS_A_SHARD, DiffusersFlow
from lightning_fdfo.flows.text_cache import TextCache

PROMPTS = ['"427" in red', '"1234" in blue', '"8"']


def conditioning(*values, length=2):
    """A row a value, with a text of `length` tokens, its mask and a pooled vector."""
    embeds = torch.tensor(values)[:, None, None].expand(-1, length, 3).clone()
    return Conditioning({"embeds": embeds, "mask": torch.ones(len(values), length), "pooled": torch.tensor(values)})


def pooled(cache, texts):
    return cache.read(texts).tensors["pooled"].tolist()


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_round_trip_in_another_instance(tmp_path):
    written = conditioning(1.0, 2.0, 3.0)
    TextCache(tmp_path).write(["a", "b", "ü\n"], written)
    cache = TextCache(tmp_path)
    assert cache.missing(["a", "b", "ü\n"]) == []
    read = cache.read(["ü\n", "a", "ü\n"]).tensors
    assert set(read) == set(written.tensors)
    for name, tensor in written[[2, 0, 2]].tensors.items():
        assert torch.equal(read[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes_are_kept(tmp_path, dtype):
    cache = TextCache(tmp_path)
    cache.write(["a"], Conditioning({"x": torch.ones(1, 2, dtype=dtype)}))
    assert cache.read(["a"]).tensors["x"].dtype == dtype


def test_texts_of_different_lengths_are_padded(tmp_path):
    cache = TextCache(tmp_path)
    cache.write(["short"], conditioning(1.0, length=2))
    cache.write(["long"], conditioning(2.0, length=4))
    read = cache.read(["short", "long"]).tensors
    assert read["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert read["embeds"][0, :, 0].tolist() == [1, 1, 0, 0]
    assert cache.read(["short"]).tensors["embeds"].shape == (1, 2, 3)


def test_what_is_missing_is_told_once_and_in_order(tmp_path):
    cache = TextCache(tmp_path / "not" / "there")
    assert cache.missing(["b", "a", "b"]) == ["b", "a"]
    cache.write(["a"], conditioning(1.0))
    assert cache.missing(["c", "b", "a", "c"]) == ["c", "b"]
    with pytest.raises(KeyError):
        cache.read(["a", "b"])


def test_two_instances_see_each_others_shards_and_may_write_the_same(tmp_path):
    one, two = TextCache(tmp_path), TextCache(tmp_path)
    assert one.missing(["a", "b"]) == two.missing(["a", "b"]) == ["a", "b"]
    one.write(["a", "b"], conditioning(1.0, 2.0))
    two.write(["b", "c"], conditioning(2.0, 3.0))
    for cache in (one, two, TextCache(tmp_path)):
        assert cache.missing(["a", "b", "c"]) == []
        assert pooled(cache, ["a", "b", "c"]) == [1.0, 2.0, 3.0]


WRITER = """
import os, sys
from pathlib import Path
import torch
from lightning_fdfo.flows.base import Conditioning
from lightning_fdfo.flows.text_cache import TextCache
name, dies = sys.argv[2], sys.argv[3] == "dies"
cache = TextCache(Path(sys.argv[1]))
for i in range(40):
    if dies and i == 39:
        Path.replace = lambda *_: os._exit(9)
    cache.write([f"{name} {i}", f"both {i}"], Conditioning({"pooled": torch.tensor([float(i), -float(i)])}))
"""


def test_two_processes_write_at_once_and_one_is_killed_before_it_renames(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name, fate])
        for name, fate in (("a", "lives"), ("b", "dies"))
    ]
    assert [writer.wait() for writer in writers] == [0, 9]
    cache = TextCache(tmp_path)
    texts = [f"{name} {i}" for name in ("a", "b", "both") for i in range(40)]
    assert cache.missing(texts) == ["b 39"]
    assert pooled(cache, ["a 7", "b 38", "both 39", "both 5"]) == [7.0, 38.0, -39.0, -5.0]
    assert len(list(tmp_path.glob(".*.partial-*"))) == 1


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "in the length", "in the header", "in the data"])
def test_a_truncated_shard_is_ignored_and_its_texts_encoded_again(tmp_path, kept):
    TextCache(tmp_path).write(["a", "b"], conditioning(1.0, 2.0))
    (shard,) = shards(tmp_path)
    shard.write_bytes(shard.read_bytes()[:kept])
    cache = TextCache(tmp_path)
    assert cache.missing(["a", "b"]) == ["a", "b"]
    cache.write(["a", "b"], conditioning(3.0, 4.0))
    for instance in (cache, TextCache(tmp_path)):
        assert pooled(instance, ["a", "b"]) == [3.0, 4.0]


@pytest.mark.parametrize("error", [OSError("no space left on device"), SafetensorError("no space left on device")])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, error):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    cache = TextCache(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(text_cache, "save_file", full)
        with pytest.raises(ConfigurationError, match=r"cannot write to .*cache \(no space left.*choose a folder"):
            cache.write(["a"], conditioning(1.0))
    assert list((tmp_path / "cache").iterdir()) == []
    assert cache.missing(["a"]) == ["a"]
    cache.write(["a"], conditioning(1.0))
    assert pooled(cache, ["a"]) == [1.0]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"flow\.text_cache: cannot write to .*file"):
        TextCache(tmp_path / "file" / "cache").write(["a"], conditioning(1.0))


def peak_memory():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def test_to_read_one_row_is_not_to_read_the_shard(tmp_path):
    """A sparse file of 2 GiB and a row of 1 MiB: what the process holds at most grows by no eighth of the file."""
    cache, rows, columns = TextCache(tmp_path), 1 << 11, 1 << 18
    size = 4 * rows * columns
    names = [f"text {row}" for row in range(rows)]
    header = {
        "__metadata__": {"keys": json.dumps([text_cache._key(name) for name in names])},
        "embeds": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, size]},
    }
    encoded = json.dumps(header).encode()
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.seek(size - 4, os.SEEK_CUR)
        file.write(torch.tensor(7.0).numpy().tobytes())
    before = peak_memory()
    assert cache.missing(names) == []
    row = cache.read(names[-1:]).tensors["embeds"]
    assert peak_memory() - before < size / 8
    assert row.shape == (1, columns)
    assert row[0, -1] == 7


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
    flow.cache_texts(PROMPTS[:1], [], torch.device("cpu"))
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
    flow.cache_texts(PROMPTS, ["", "blue", "red"], torch.device("cpu"))
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
    first.cache_texts(PROMPTS, [""], torch.device("cpu"))
    gc.collect()
    assert len(encoders) == 2
    assert encoders[0]() is None
    first.encode(PROMPTS, [""] * 3)
    second = cached()
    second.load()
    second.cache_texts(PROMPTS, ["", ""], torch.device("cpu"))
    second.encode(PROMPTS, [""] * 3)
    assert len(encoders) == 2
    assert [parts == WITHOUT_MODEL for parts in loads] == [False, True, False]


def test_a_text_that_nobody_told_of_is_encoded_when_it_comes(cached, loads):
    flow = cached()
    flow.load()
    flow.cache_texts(PROMPTS[:1], [], torch.device("cpu"))
    flow.encode(PROMPTS)
    flow.encode(PROMPTS)
    assert [parts == WITHOUT_MODEL for parts in loads] == [False, True, True]


def test_negative_prompts_have_a_cache_of_their_own(cached, tmp_path):
    flow = cached()
    flow.load()
    flow.cache_texts(["a"], ["a"], torch.device("cpu"))
    assert len(shards(tmp_path / "texts")) == len(fingerprints(tmp_path)) == 2


def test_texts_are_encoded_in_shards_each_once(cached, tmp_path):
    flow, texts = cached(), [f'"{n % (TEXTS_A_SHARD + 5)}"' for n in range(100)]
    flow.load()
    flow.cache_texts(texts, [], torch.device("cpu"))
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
