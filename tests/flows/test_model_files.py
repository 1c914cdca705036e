"""Model folders that are not what they should be: each is told in one line that names what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import DiffusersFlow, StableDiffusion3, resolve_pretrained


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped model."""
    return Path(shutil.copytree(resolve_pretrained("tiny-digits"), tmp_path / "model"))


def weights(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return file


def edit(folder, part, change):
    file = weights(folder, part)
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


TENSORS = {
    "transformer": "transformer_blocks.0.attn.to_q.weight",
    "vae": "decoder.conv_norm_out.weight",
    "text_encoder": "text_model.encoder.layers.0.layer_norm1.weight",
    "text_encoder_2": "text_projection.weight",
}


@pytest.mark.parametrize(("part", "tensor"), TENSORS.items())
def test_a_tensor_that_is_missing_is_named(folder, part, tensor):
    edit(folder, part, lambda state: state.pop(tensor))
    with pytest.raises(ConfigurationError, match=rf"{folder}/{part}: its weights lack a tensor: {tensor}; the files"):
        StableDiffusion3(str(folder)).load()


def test_of_many_missing_tensors_some_are_named(folder):
    edit(folder, "transformer", lambda state: [state.pop(name) for name in sorted(state) if "to_q" in name])
    with pytest.raises(ConfigurationError, match=r"lack \d+ tensors: (\S+to_q\S+, ){2}\S+ and \d+ more; the files"):
        StableDiffusion3(str(folder)).load()


@pytest.mark.parametrize(("part", "tensor"), TENSORS.items())
def test_a_tensor_of_another_shape_is_told(folder, part, tensor):
    edit(folder, part, lambda state: state.update({tensor: torch.zeros(3)}))
    with pytest.raises(ConfigurationError, match="is no model that can be read") as caught:
        StableDiffusion3(str(folder)).load()
    assert tensor in str(caught.value)
    assert "\n" not in str(caught.value)


def cut(folder):
    file = weights(folder, "transformer")
    file.write_bytes(file.read_bytes()[:-100])


def leave_a_pointer(folder):
    weights(folder, "vae").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


DAMAGES = {
    "a transformer that is cut": cut,
    "a pointer of git-lfs": leave_a_pointer,
    "no weights of the VAE": lambda folder: weights(folder, "vae").unlink(),
    "no weights of a text encoder": lambda folder: weights(folder, "text_encoder").unlink(),
    "no transformer": lambda folder: shutil.rmtree(folder / "transformer"),
    "no tokenizer": lambda folder: shutil.rmtree(folder / "tokenizer"),
    "a tokenizer without words": lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(),
    "no scheduler": lambda folder: shutil.rmtree(folder / "scheduler"),
    "a configuration that is none": lambda folder: (folder / "vae" / "config.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_folder_that_is_half_downloaded_is_told(folder, damage):
    damage(folder)
    with pytest.raises(ConfigurationError, match=rf"flow.pretrained: {folder}.* again") as caught:
        StableDiffusion3(str(folder)).load()
    assert "\n" not in str(caught.value)


def test_an_empty_folder_and_one_that_may_not_be_read(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"is no diffusers pipeline: cannot read its model_index.json"):
        StableDiffusion3(str(tmp_path)).validate()

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("is_dir", "read_text"):
        monkeypatch.setattr(Path, name, refuse)
    for ask in (lambda: DiffusersFlow(str(tmp_path)), StableDiffusion3(str(tmp_path)).validate):
        with pytest.raises(ConfigurationError, match=r"cannot read its model_index.json .*Permission denied"):
            ask()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequence_length": -3}, r"max_sequence_length: StableDiffusion3 expected 0 to 512 tokens, got -3"),
        ({"max_sequence_length": 513}, r"max_sequence_length: StableDiffusion3 expected 0 to 512 tokens, got 513"),
        ({"text_encoders": "away"}, r"text_encoders: expected one of offload, keep, cache, got 'away'"),
        ({"quantization": "nf3"}, r"quantization: expected one of None, nf4, int8, int8_torchao, got 'nf3'"),
        ({"dtype": "float8"}, r"dtype: expected one of float32, bfloat16, float16, got 'float8'"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_loads(options, message):
    with pytest.raises(ConfigurationError, match=f"flow.{message}"):
        StableDiffusion3("tiny-digits", **options).validate()


def test_a_revision_of_a_folder_has_no_effect_and_this_is_said():
    with pytest.warns(UserWarning, match="flow.revision: v7 has no effect: .* is a folder"):
        StableDiffusion3("tiny-digits", revision="v7").validate()
