"""LoRA on the shipped model: what its settings do to velocities, and its files in plain diffusers."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import StableDiffusion3, resolve_pretrained
from lightning_fdfo.flows.lora import LoRA, dropout_layers
from lightning_fdfo.flows.lora_files import LORA_FILE, add_lora, save_lora
from lightning_fdfo.sampling import sample

PROMPTS = ['"427" in red', '"1234" in blue']
NAME = "pytorch_lora_weights.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"


def loaded(dtype="float32"):
    flow = StableDiffusion3("tiny-digits", dtype=dtype, max_sequence_length=0)
    flow.load()
    return flow


def bound(lora, dtype="float32", seed=0):
    flow = loaded(dtype)
    add_lora(flow, lora, seed)
    return flow


@torch.no_grad()
def randomise(flow, seed=5):
    """As training would: B leaves 0, and DoRA's magnitudes their start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in flow.transformer.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_B" in name:
            parameter.copy_(noise / 4)
        elif "magnitude" in name:
            parameter.mul_(1 + noise / 4)
    return flow


def trainable(flow):
    return {name: p for name, p in flow.transformer.named_parameters() if p.requires_grad}


def latents():
    return torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def velocity(flow, conditioning):
    return flow.velocity(latents(), torch.tensor([0.9, 0.3]), conditioning)


def plain_pipeline(folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        resolve_pretrained("tiny-digits"), text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder, weight_name=NAME)
    return pipeline


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha / rank", "alpha / sqrt(rank)"])
def test_the_layer_is_w_plus_scale_b_a(conditioning, rslora):
    lora = LoRA(rank=4, alpha=6, targets=(LAYER,), rslora=rslora)
    flow, by_hand = randomise(bound(lora)), loaded()
    weights = {name.split(".")[-3]: value for name, value in trainable(flow).items()}
    assert set(weights) == {"lora_A", "lora_B"}
    with torch.no_grad():
        change = (6 / 4 if not rslora else 6 / 2) * weights["lora_B"] @ weights["lora_A"]
        by_hand.transformer.get_submodule(LAYER).weight.add_(change)
    expected = velocity(by_hand, conditioning)
    torch.testing.assert_close(velocity(flow, conditioning), expected, rtol=1e-4, atol=1e-4)
    assert (velocity(loaded(), conditioning) - expected).abs().max() > 0.01


def test_a_dora_layer_is_magnitudes_times_directions(conditioning):
    flow, by_hand = randomise(bound(LoRA(rank=4, alpha=6, targets=(LAYER,), dora=True))), loaded()
    weights = {name.split(".")[-3]: value for name, value in trainable(flow).items()}
    assert set(weights) == {"lora_A", "lora_B", "lora_magnitude_vector"}
    weight = by_hand.transformer.get_submodule(LAYER).weight
    with torch.no_grad():
        moved = weight + 6 / 4 * weights["lora_B"] @ weights["lora_A"]
        weight.copy_(weights["lora_magnitude_vector"][:, None] * moved / moved.norm(dim=1, keepdim=True))
    torch.testing.assert_close(velocity(flow, conditioning), velocity(by_hand, conditioning), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
def test_it_starts_from_the_base_model(conditioning, dtype, dora):
    """PEFT alone rounds DoRA's magnitudes to the base's dtype: 0.6 % of the velocity in bfloat16."""
    base, start = (velocity(flow, conditioning) for flow in (loaded(dtype), bound(LoRA(rank=2, dora=dora), dtype)))
    assert (start - base).norm() < 1e-6 * base.norm()


@pytest.mark.parametrize(
    "lora",
    [LoRA(rank=4, alpha=12), LoRA(rank=4, alpha=12, rslora=True), LoRA(rank=4, alpha=12, dora=True)],
    ids=["lora", "rslora", "dora"],
)
def test_the_file_gives_the_same_images_in_plain_diffusers(tmp_path, lora):
    flow = randomise(bound(lora))
    save_lora(flow, tmp_path)
    conditioning = flow.encode(PROMPTS)
    with torch.no_grad():
        ours, base = (
            each.decode(sample(lambda x, s, f=each: f.velocity(x, s, conditioning), latents(), each.sigmas(4, 32, 64)))
            for each in (flow, loaded())
        )
    theirs = plain_pipeline(tmp_path)(
        PROMPTS, height=32, width=64, num_inference_steps=4, guidance_scale=1.0, latents=latents(),
        max_sequence_length=0, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(theirs.float(), ours, rtol=0, atol=1e-4)
    assert (ours - base).abs().max() > 0.1


def test_dora_trains_all_its_parts(conditioning):
    flow = randomise(bound(LoRA(rank=2, alpha=2, dora=True)))
    before = {name: value.detach().clone() for name, value in trainable(flow).items()}
    assert {name.split(".")[-3] for name in before} == {"lora_A", "lora_B", "lora_magnitude_vector"}
    optimizer = torch.optim.SGD(trainable(flow).values(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = flow.velocity(latents(), torch.tensor([0.9, 0.3]), conditioning).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    first_block = {name: value for name, value in trainable(flow).items() if name.startswith("transformer_blocks.0.")}
    assert all(not torch.equal(value, before[name]) for name, value in first_block.items())


def starts(lora, seed=0):
    return {name: value.detach().clone() for name, value in trainable(bound(lora, seed=seed)).items()}


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_initial_weights_are_as_said_and_a_function_of_the_seed(init):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (starts(LoRA(rank=8, init=init), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for name, value in first.items():
        if "lora_B" in name:
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])
            width = value.shape[1] ** -0.5
            if init == "kaiming":
                assert value.abs().max() <= width
                assert value.std() == pytest.approx(width / 3**0.5, rel=0.1)
            else:
                assert value.std() == pytest.approx(1 / 8, rel=0.1)


def test_targets_are_names_or_their_ends():
    count = {
        targets: len(add_lora(loaded(), LoRA(rank=1, targets=targets), 0))
        for targets in (("attn.to_q",), (LAYER,), ("to_q", "attn.to_k"), ("0.attn.to_q",))
    }
    blocks = len(loaded().blocks)
    assert list(count.values()) == [blocks, 1, 2 * blocks, 1]
    with pytest.raises(ConfigurationError, match=r"'_q' matches no linear layer"):
        add_lora(loaded(), LoRA(targets=("_q",)), 0)


def test_dropout_is_off_until_it_is_switched_on(conditioning):
    flow = randomise(bound(LoRA(rank=4, alpha=8, dropout=0.5)))
    layers = dropout_layers(flow.transformer)
    assert len(layers) == 31
    off = velocity(flow, conditioning)
    without = velocity(randomise(bound(LoRA(rank=4, alpha=8))), conditioning)
    torch.testing.assert_close(off, without, rtol=1e-5, atol=1e-5)
    for layer in layers:
        layer.train()
    assert (velocity(flow, conditioning) - off).abs().max() > 0.01
    assert not torch.equal(velocity(flow, conditioning), velocity(flow, conditioning))
    assert dropout_layers(bound(LoRA(rank=4)).transformer) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"targets": ()},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(ConfigurationError, match=rf"lora\.{name}: expected"):
        LoRA(**settings)


@pytest.mark.parametrize("settings", [{}, {"rank": 1, "alpha": 0.1}, {"dropout": 0.99}, {"targets": ("to_q",)}])
def test_settings_in_range_pass(settings):
    LoRA(**settings)


def test_equal_loras_are_equal_files(tmp_path):
    """safetensors gives the metadata a random order in every file, and a set of names has one in every process."""
    flow, files = bound(LoRA(rank=2, alpha=4)), set()
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        save_lora(flow, tmp_path / str(number))
        files.add((tmp_path / str(number) / LORA_FILE).read_bytes())
    assert len(files) == 1
    (content,) = files
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    settings = json.loads(header["__metadata__"]["lora_adapter_metadata"])
    assert settings["transformer.target_modules"] == sorted(flow.transformer.peft_config["default"].target_modules)
    assert len(settings["transformer.target_modules"]) > 1
