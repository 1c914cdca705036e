import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import text_cache
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.text_cache import TextCache
from tests.processes import FORKS

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


def write_all(folder, name, dies):
    """Writes forty times; one that dies does so in the last, before its file is renamed."""
    cache = TextCache(folder)
    for i in range(40):
        if dies and i == 39:
            Path.replace = lambda *_: os._exit(9)
        cache.write([f"{name} {i}", f"both {i}"], Conditioning({"pooled": torch.tensor([float(i), -float(i)])}))


def test_two_processes_write_at_once_and_one_is_killed_before_it_renames(tmp_path):
    writers = [FORKS.Process(target=write_all, args=(tmp_path, name, name == "b")) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 9]
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
