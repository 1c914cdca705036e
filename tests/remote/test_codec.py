"""Bodies: what goes in comes out, to the bit; whatever else comes in is refused, and never a crash."""

import io
import json
import pickle
import random
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lightning_fdfo.remote.codec import decode_request, encode_request
from lightning_fdfo.remote.protocol import MAX_HEADER, MAX_PROMPT, Limits, RefusalError, ScoreRequest
from lightning_fdfo.testing.reward_sample import sample_images

PROMPTS = ["a cat", 'ein «Ozean» in "Blau"\n\x00', "", "雨"]
METADATA = [{"text": "427", "nested": {"a": [1, 2.5e-310, None, True]}}, {}, {"0.1": 0.1}, {"big": 2**70}]


def request_of(images, encoding="safetensors", **changes):
    count = len(images)
    facts = {"fingerprint": "f", "prompts": PROMPTS[:count], "metadata": METADATA[:count], "encoding": encoding}
    return ScoreRequest(**(facts | changes))


def body_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def raw(tensors, count=1, encoding="safetensors", **changes):
    """A header by hand: the library would not write it."""
    facts = {"schema_version": 1, "fingerprint": "f", "prompts": ["a"] * count, "metadata": [{}] * count}
    request = json.dumps(facts | {"encoding": encoding} | changes)
    return {"__metadata__": {"request": request}, **tensors}


def image(shape=(1, 3, 2, 2), dtype="F32", offsets=(0, 48)):
    return {"images": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def refusal(body, limits=None):
    with pytest.raises(RefusalError) as error:
        decode_request(body, limits or Limits())
    assert 400 <= error.value.status < 500
    return error.value


def test_float_images_come_out_to_the_bit():
    images = torch.rand(4, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :3] = torch.tensor([0.0, 1.0, 1e-45])  # the smallest float32 there is
    request, decoded = decode_request(encode_request(request_of(images), images), Limits())
    assert torch.equal(decoded, images)
    assert decoded.dtype == torch.float32
    assert (request.prompts, request.metadata) == (PROMPTS, METADATA)


def test_png_keeps_eight_bits():
    images = torch.randint(0, 256, (3, 3, 6, 5), generator=torch.Generator().manual_seed(0)).float() / 255
    assert torch.equal(decode_request(encode_request(request_of(images, "png"), images), Limits())[1], images)
    smooth = sample_images(16, 16)
    _, decoded = decode_request(encode_request(request_of(smooth, "png"), smooth), Limits())
    assert 0 < (decoded - smooth).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e-6, 1.5])
def test_images_are_finite_and_in_range(value):
    images = torch.full((2, 3, 4, 4), 0.5)
    images[1, 2, 3, 3] = value
    refused = refusal(encode_request(request_of(images), images))
    assert refused.status == 422
    assert "[0, 1]" in str(refused)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (image(dtype="F64", shape=(1, 3, 1, 2)), "F64"),
        (image(dtype="I32"), "I32"),
        (image(dtype="NO"), "safetensors"),
        (image(shape=(1, 1, 3, 4)), r"\[1, 1, 3, 4\]"),
        (image(shape=(2, 3, 1, 2)), r"\[2, 3, 1, 2\]"),
        (image(shape=(3, 2, 2)), r"\[3, 2, 2\]"),
        (image(offsets=(-48, 0)), "safetensors"),
        (image(offsets=(0, 2**64 - 1)), "safetensors"),
        (image(offsets=(48, 0)), "safetensors"),
        (image(offsets=(0, 4096)), "safetensors"),
        (image(offsets=(0, 2**70)), "safetensors"),
        (image(shape=(1, 3, 2**63, 2**63)), "safetensors"),
        (image(shape=(1, 3, -2, -2)), "safetensors"),
        (image() | {"more": {"dtype": "F32", "shape": [0], "data_offsets": [48, 48]}}, "2 tensors"),
        ({}, "safetensors"),
    ],
)
def test_tensors_that_are_no_images(tensors, said):
    refused = refusal(body_of(raw(tensors), bytes(48)))
    assert refused.status == 400
    assert re.search(said, str(refused))


def test_images_without_pixels():
    empty = {"images": {"dtype": "F32", "shape": [1, 3, 0, 5], "data_offsets": [0, 0]}}
    assert "at least one pixel" in str(refusal(body_of(raw(empty))))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00" * 7,
        bytes(8),
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        body_of(b"{"),
        body_of(b"[1]"),
        body_of(b"\xff\xfe{}"),
        body_of({"images": {}}),
        body_of({"__metadata__": {"other": "1"}}),
        body_of({"__metadata__": {"request": {"nested": 1}}}),
        body_of({"__metadata__": {"request": "{"}}),
        body_of({"__metadata__": {"request": "NaN"}}),
        body_of({"__metadata__": {"request": "[" * 100_000}}),
        body_of(b"[" * 100_000),
        body_of(b'{"__metadata__":' * 10_000),
        pickle.dumps({"images": [1.0]}),
        body_of(pickle.dumps([1])),
    ],
)
def test_what_is_no_safetensors_file(body):
    assert refusal(body).status == 400


def test_a_header_over_the_limit_is_not_parsed():
    assert refusal(body_of(b" " * (MAX_HEADER + 1))).status == 413


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 2},
        {"prompts": ["a", "b"]},
        {"prompts": []},
        {"prompts": [], "metadata": []},
        {"prompts": "a"},
        {"prompts": [1]},
        {"prompts": ["a" * (MAX_PROMPT + 1)]},
        {"metadata": [[]]},
        {"encoding": "pickle"},
        {"fingerprint": "f" * 101},
        {"code": "import os"},
        {"metadata": [{"deep": json.loads("[" * 500 + "]" * 500)}]},
    ],
)
def test_requests_that_are_none(changes):
    assert refusal(body_of(raw(image(), **changes), bytes(48))).status == 400


def test_a_refusal_does_not_repeat_the_input():
    refused = refusal(body_of(raw(image(), prompts=["secret " * 2000]), bytes(48)))
    assert "secret" not in str(refused)
    assert "10000 characters" in str(refused)
    assert len(str(refusal(body_of(raw(image(), **{"k" * 10_000: 1}), bytes(48))))) <= 500


def test_limits():
    images = sample_images(4, 4)
    body = encode_request(request_of(images), images)
    assert "at most 3 images, got 4" in str(refusal(body, Limits(max_batch=3)))
    assert "at most 63 pixels in all, got 64" in str(refusal(body, Limits(max_pixels=63)))
    assert decode_request(body, Limits(max_batch=4, max_pixels=64))


def png_body(*files, count=None):
    tensors = {str(row): torch.frombuffer(bytearray(file), dtype=torch.uint8) for row, file in enumerate(files)}
    facts = {"fingerprint": "f", "prompts": ["a"] * (count or len(files)), "metadata": [{}] * (count or len(files))}
    request = json.dumps(facts | {"schema_version": 1, "encoding": "png"})
    return safetensors.torch.save(tensors, {"request": request})


def png(mode="RGB", size=(4, 4), kind="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format=kind)
    return buffer.getvalue()


def bomb(width, height):
    """A PNG of a few bytes that says it is huge."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8_000, 8_000), (60_000, 2_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_not_decoded(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "__array_interface__", property(lambda image: pytest.fail("it was decoded")))
    assert refusal(png_body(bomb(*size))).status in (400, 413)
    monkeypatch.undo()


def test_texts_in_png_do_not_add_up():
    """Each unfolds to megabytes, and is gone before the next."""
    info = PngInfo()
    for key in "abcde":
        info.add_text(key, "x" * 1_000_000, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="PNG", pnginfo=info)
    body = png_body(*[buffer.getvalue()] * 32)
    assert len(body) < 32 * 10_000
    tracemalloc.start()
    decode_request(body, Limits())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 5_000_000


def test_many_small_bombs_are_one_large_one(monkeypatch):
    files = [png(size=(100, 100))] * 5
    assert decode_request(png_body(*files), Limits(max_pixels=50_000))
    monkeypatch.setattr(Image.Image, "__array_interface__", property(lambda image: pytest.fail("it was decoded")))
    assert refusal(png_body(*files), Limits(max_pixels=49_999)).status == 413


@pytest.mark.parametrize(
    "files",
    [
        [png("RGBA")], [png("L")], [png("P")], [png("I;16")], [png(), png(size=(4, 5))], [png(kind="JPEG")],
        [png(kind="GIF")], [png()[:40]], [b"\x89PNG\r\n\x1a\n"], [b"\x00"], [bomb(100, 100)],
    ],
)  # fmt: skip
def test_what_is_no_png(files):
    assert refusal(png_body(*files)).status == 400


def test_png_that_are_too_few():
    assert refusal(png_body(png(), count=2)).status == 400


def test_random_bytes_are_refused():
    """Bodies with a few bytes changed, cut or added: a batch or a refusal, and nothing else."""
    dice = random.Random(0)
    images = sample_images(4, 4)
    whole = [encode_request(request_of(images, encoding), images) for encoding in ("safetensors", "png")]
    statuses = set()
    for _ in range(1500):
        body = bytearray(dice.choice(whole))
        for _ in range(dice.randint(1, 8)):
            body[dice.randrange(min(len(body), dice.choice([8, 400, len(body)])))] = dice.randrange(256)
        body = bytes(body[: dice.randint(0, len(body))]) if dice.random() < 0.2 else bytes(body)
        try:
            _, decoded = decode_request(body, Limits())
        except RefusalError as error:
            statuses.add(error.status)
        else:
            assert decoded.shape == (4, 3, *decoded.shape[2:])
            assert np.isfinite(decoded.numpy()).all()
    assert {400, 422} <= statuses <= {400, 413, 422}
    for _ in range(300):
        assert refusal(dice.randbytes(dice.randint(0, 300)))
