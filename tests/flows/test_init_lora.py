"""A run whose LoRA starts from a file: whatever its alpha, and what does not fit is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_contents import check_lora_file
from lightning_fdfo.flows.lora_files import save_lora
from tests.flows.test_lora import LAYER, NAME, bound, loaded, randomise, trainable, velocity


@pytest.mark.parametrize("saved", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("own", [{"alpha": 12.0}, {"alpha": 2.0}, {"alpha": 2.0, "rslora": True}])
def test_a_run_starts_from_a_file_whatever_its_own_alpha(tmp_path, conditioning, saved, own):
    trained = randomise(bound(LoRA(rank=4, alpha=12, **saved)))
    save_lora(trained, tmp_path)
    lora = LoRA(rank=4, dora=saved.get("dora", False), init_lora=str(tmp_path / NAME), **own)
    flow = bound(lora)
    expected = velocity(trained, conditioning)
    torch.testing.assert_close(velocity(flow, conditioning), expected, rtol=1e-4, atol=1e-4)
    assert all(value.dtype == torch.float32 for value in trainable(flow).values())
    assert {"lora_A", "lora_B"} <= {name.split(".")[-3] for name in trainable(flow)}
    if own["alpha"] == 12 and not saved.get("rslora"):  # folded into the file and out again: two roundings
        torch.testing.assert_close(trainable(flow), trainable(trained), rtol=3e-7, atol=0)


def test_a_file_without_metadata_has_scale_1_as_in_diffusers(tmp_path, conditioning):
    save_lora(randomise(bound(LoRA(rank=4, alpha=12))), tmp_path)
    save_file(load_file(tmp_path / NAME), tmp_path / NAME)
    theirs = loaded()
    theirs.pipeline.load_lora_weights(tmp_path, weight_name=NAME)
    flow = bound(LoRA(rank=4, alpha=3, init_lora=str(tmp_path / NAME)))
    torch.testing.assert_close(velocity(flow, conditioning), velocity(theirs, conditioning), rtol=1e-4, atol=1e-4)


def test_alphas_of_single_layers_are_taken_from_the_file(tmp_path, conditioning):
    trained = randomise(bound(LoRA(rank=4, alpha=12)))
    trained.transformer.peft_config["default"].alpha_pattern = {"0.attn.to_q": 2, "attn.to_k": 40}
    save_lora(trained, tmp_path)
    theirs = loaded()
    theirs.pipeline.load_lora_weights(tmp_path, weight_name=NAME)
    flow = bound(LoRA(rank=4, alpha=3, init_lora=str(tmp_path / NAME)))
    torch.testing.assert_close(velocity(flow, conditioning), velocity(theirs, conditioning), rtol=1e-4, atol=1e-4)
    assert (velocity(trained, conditioning) - velocity(theirs, conditioning)).abs().max() > 0.01


@pytest.fixture
def file(tmp_path):
    save_lora(bound(LoRA(rank=4, alpha=12)), tmp_path)
    return tmp_path / NAME


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"rank": 3}, r"LoRA of rank 3: it has \(4, \d+\) for .*lora_A.*, expected \(3, \d+\); set lora\.rank"),
        ({"targets": (LAYER,)}, r"it has \(4, \d+\) for .*, expected nothing; set lora\.rank, lora\.targets"),
        ({"targets": ("attn.to_q", "ff.net.2")}, r"expected nothing; set lora\.rank, lora\.targets"),
        ({"dora": True}, r"it has nothing for .*lora_magnitude_vector, expected \(\d+,\); .*lora\.dora as it was"),
    ],
    ids=["rank", "fewer layers", "other layers", "dora"],
)
def test_a_file_that_does_not_fit_is_refused(file, own, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        bound(LoRA(**{"rank": 4, "init_lora": str(file), **own}))
    assert str(file) in str(error.value)


def test_a_file_that_lacks_a_layer_is_refused(file):
    save_file({name: value for name, value in load_file(file).items() if f".{LAYER}.lora_B" not in f".{name}"}, file)
    with pytest.raises(ConfigurationError, match=rf"it has nothing for {LAYER}\.lora_B\.weight, expected \(\d+, 4\)"):
        bound(LoRA(rank=4, init_lora=str(file)))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.replace("transformer.", "text_encoder.", 1), r"named text_encoder\.…, expected transformer"),
        (lambda name: name.removeprefix("transformer."), r"named transformer_blocks\.…, expected transformer\.… alone"),
    ],
    ids=["text encoder", "no prefix"],
)
def test_weights_beside_the_transformers_are_refused(file, rename, message):
    state = load_file(file)
    save_file({**dict(list(state.items())[4:]), **{rename(n): v for n, v in list(state.items())[:4]}}, file)
    with pytest.raises(ConfigurationError, match=message + r".*without text encoders"):
        bound(LoRA(rank=4, init_lora=str(file)))


@pytest.mark.parametrize("content", [None, b"", b"PK and so on", "truncated"])
def test_a_file_that_is_no_lora_file_is_refused_before_anything_loads(file, content):
    path = file.with_name("other.safetensors")
    if content is not None:
        path.write_bytes(file.read_bytes()[:-8] if content == "truncated" else content)
    with pytest.raises(ConfigurationError, match=r"expected a \.safetensors file by diffusers' .*, got .*other"):
        check_lora_file(path, "lora.init_lora")
    check_lora_file(file, "lora.init_lora")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigurationError, match=r"expected a \.safetensors file"):
        check_lora_file(tmp_path, "lora.init_lora")
