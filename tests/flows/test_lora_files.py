"""LoRA files: they act the same without their metadata, and one that is not complete or not finite is no LoRA."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_fdfo.__main__ import main
from lightning_fdfo.errors import ConfigurationError, DivergenceError
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_contents import describe_lora, lora_in_file
from lightning_fdfo.flows.lora_files import LORA_FILE, add_lora, adopt_lora, check_lora, fold_file, save_lora
from lightning_fdfo.sampling import sample
from tests.conftest import ToyFlow
from tests.flows.test_lora import LAYER, PROMPTS, bound, latents, loaded, randomise, velocity

ROOT = Path(__file__).parents[2]
KINDS = [LoRA(rank=4, alpha=12), LoRA(rank=4, alpha=12, rslora=True), LoRA(rank=4, alpha=12, dora=True)]
IDS = ["lora", "rslora", "dora"]


def settings_of(file):
    with safe_open(file, framework="pt") as content:
        settings = json.loads((content.metadata() or {})["lora_adapter_metadata"])
    return {name.removeprefix("transformer."): value for name, value in settings.items()}


def unfolded(flow, folder):
    """As diffusers' own training scripts, and earlier versions of this package, write a LoRA."""
    weights = get_peft_model_state_dict(flow.transformer)
    metadata = _collate_lora_metadata({"transformer": flow.transformer})
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=weights, **metadata)
    return folder / LORA_FILE


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file as it is written, of 31 layers."""
    folder = tmp_path_factory.mktemp("whole")
    save_lora(randomise(bound(LoRA(rank=4, alpha=12))), folder)
    return folder / LORA_FILE


# Without metadata


@pytest.mark.parametrize("lora", KINDS, ids=IDS)
def test_the_bare_state_dict_paints_the_runs_picture(tmp_path, lora):
    flow = randomise(bound(lora))
    save_lora(flow, tmp_path)
    encoded = flow.encode(PROMPTS)
    with torch.no_grad():
        ours = flow.decode(sample(lambda x, s: flow.velocity(x, s, encoded), latents(), flow.sigmas(4, 32, 64)))
    pipeline = loaded().pipeline
    pipeline.load_lora_weights(load_file(tmp_path / LORA_FILE))
    theirs = pipeline(
        PROMPTS, height=32, width=64, num_inference_steps=4, guidance_scale=1.0, latents=latents(),
        max_sequence_length=0, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(theirs.float(), ours, rtol=0, atol=1e-4)
    settings = settings_of(tmp_path / LORA_FILE)
    assert (settings["lora_alpha"], settings["r"], settings["use_rslora"]) == (4, 4, False)
    assert (settings["alpha_pattern"], settings["use_dora"]) == ({}, lora.dora)


@pytest.mark.parametrize("lora", KINDS, ids=IDS)
def test_a_file_that_is_read_back_gives_the_runs_velocity(tmp_path, conditioning, lora):
    trained = randomise(bound(lora))
    save_lora(trained, tmp_path)
    expected, judged = velocity(trained, conditioning), loaded()
    adopt_lora(judged, tmp_path / LORA_FILE)
    start = LoRA(rank=4, alpha=64, dora=lora.dora, init_lora=str(tmp_path / LORA_FILE))
    for flow in (judged, bound(start)):
        torch.testing.assert_close(velocity(flow, conditioning), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", KINDS, ids=IDS)
def test_a_file_of_the_other_kind_is_read_and_folded_on_export(tmp_path, conditioning, lora):
    trained = randomise(bound(lora))
    other, folded = unfolded(trained, tmp_path), tmp_path / "folded.safetensors"
    fold_file(other, folded)
    assert settings_of(other)["lora_alpha"] == 12
    assert settings_of(folded)["lora_alpha"] == 4
    for file in (other, folded):
        judged = loaded()
        adopt_lora(judged, file)
        torch.testing.assert_close(
            velocity(judged, conditioning), velocity(trained, conditioning), rtol=1e-4, atol=1e-4
        )
    save_lora(trained, tmp_path / "own")
    own, theirs = load_file(tmp_path / "own" / LORA_FILE), load_file(folded)
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())
    fold_file(folded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == folded.read_bytes()


def test_a_flow_without_a_diffusers_pipeline_saves_and_reads_its_lora(tmp_path):
    trained, other = ToyFlow(), ToyFlow()
    for flow in (trained, other):
        flow.load()
    bound = add_lora(trained, LoRA(rank=2, alpha=6), seed=0)
    randomise(trained)
    save_lora(trained, tmp_path)
    check_lora(other, tmp_path / LORA_FILE)
    found = adopt_lora(other, tmp_path / LORA_FILE)
    assert (found.rank, found.alpha, sorted(found.targets)) == (2, 2, sorted(bound))
    encoded, sigma = trained.encode(PROMPTS), torch.tensor(0.5)
    images = torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        expected = trained.velocity(images, sigma, encoded)
        torch.testing.assert_close(other.velocity(images, sigma, encoded), expected)
    (tmp_path / LORA_FILE).write_bytes(b"PK")
    with pytest.raises(ConfigurationError, match=r"LoRA .*: expected a \.safetensors file: "):
        check_lora(other, tmp_path / LORA_FILE)


def test_the_scale_of_our_configurations_loses_no_bit(tmp_path):
    """64 / 32 is a power of two: what is trained is in the file, times 2, and what is read back is what was trained."""
    trained = randomise(bound(LoRA(rank=4, alpha=8)))
    save_lora(trained, tmp_path)
    again = dict(bound(LoRA(rank=4, alpha=8, init_lora=str(tmp_path / LORA_FILE))).transformer.named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in trained.transformer.named_parameters())


# What is refused, or told


@pytest.fixture
def validate(monkeypatch, capsys, tmp_path):
    """Runs `validate` on a LoRA file and returns exit code and standard error."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-fdfo"])
    (tmp_path / "prompts.txt").write_text('"427" in red\n')
    small = [
        f"--data.val={tmp_path}/prompts.txt",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--model.evaluation.metrics=null",
    ]
    small += [
        "--model.rewards={Colorfulness: 1.0}",
        "--model.sampling.num_steps=1",
        "--trainer.enable_progress_bar=false",
    ]

    def run(file, *more):
        code = 0
        try:
            main(["validate", "--config=configs/quickstart.yaml", f"--ckpt_path={file}", *small, *more])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


def with_metadata(file):
    with safe_open(file, framework="pt") as content:
        return dict(content.metadata())


def part(whole, target, keep, metadata=True):
    """Some of a file's tensors, with its metadata or without."""
    state = {name: value for name, value in load_file(whole).items() if keep(name)}
    save_file(state, target, with_metadata(whole) if metadata else None)
    return target


def ten_layers(whole):
    names = sorted({name.partition(".lora_")[0] for name in load_file(whole)})[:10]
    return lambda name: name.partition(".lora_")[0] in names


def test_a_file_of_20_of_its_62_tensors_is_refused(whole, validate, tmp_path):
    code, told = validate(part(whole, tmp_path / "some.safetensors", ten_layers(whole)))
    assert code == 2
    assert "is not complete: its metadata names 31 layers of this transformer, and it has weights for 10" in told
    assert "missing: transformer_blocks." in told
    assert "and 18 more" in told


def test_without_metadata_it_is_told_on_how_many_layers_it_is(whole, validate, tmp_path, caplog):
    code, _ = validate(part(whole, tmp_path / "some.safetensors", ten_layers(whole), metadata=False))
    assert code == 0
    assert "LoRA of rank 4 on 10 of 31 layers, none on transformer_blocks." in caplog.text


def test_a_lora_on_fewer_layers_is_a_lora(tmp_path):
    save_lora(bound(LoRA(rank=4, targets=("attn.to_q",))), tmp_path)
    flow = loaded()
    adopt_lora(flow, tmp_path / LORA_FILE)
    assert describe_lora(flow.transformer, flow.lora_targets).startswith("4 of 31 layers, none on ")
    assert describe_lora(flow.transformer, ("attn.to_q",)) == "4 of 4 layers"
    assert describe_lora(flow.transformer, (LAYER,)) == "1 of 1 layers and 3 others"


@pytest.mark.parametrize("lost", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_half_a_layer_is_named_before_anything_loads(whole, tmp_path, lost):
    state = load_file(whole)
    if lost == "lora_magnitude_vector":
        state |= {"transformer.transformer_blocks.1.attn.to_q.lora_magnitude_vector": torch.ones(2)}
    state.pop(f"transformer.{LAYER}.{lost}.weight", None)
    with pytest.raises(ConfigurationError, match=rf"is not complete: it has no {lost} for .*{LAYER.split('.')[0]}"):
        lora_in_file(state, {}, tmp_path / "x.safetensors")


def test_a_single_nan_is_refused_by_name(whole, validate, tmp_path):
    state = load_file(whole)
    state[f"transformer.{LAYER}.lora_B.weight"][0, 0] = torch.nan
    file = tmp_path / "nan.safetensors"
    save_file(state, file, with_metadata(whole))
    expected = f"{file}: transformer.{LAYER}.lora_B.weight (1 of its "
    code, told = validate(file)
    assert code == 2
    assert f"--ckpt_path: {expected}" in told
    code, told = validate("last", f"--model.lora.init_lora={file}", "--ckpt_path=null", "--model.lora.rank=4")
    assert code == 2
    assert f"lora.init_lora: {expected}" in told


def test_nothing_that_is_not_finite_is_written(tmp_path):
    flow = bound(LoRA(rank=4))
    next(value for name, value in flow.transformer.named_parameters() if "lora_A" in name).data[0, 0] = torch.inf
    with pytest.raises(DivergenceError, match=r"the trained weights are not finite: .*lora_A\.weight \(1 of"):
        save_lora(flow, tmp_path)
    assert not list(tmp_path.iterdir())


def test_kohyas_names_get_a_true_sentence(validate, tmp_path):
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    state = {f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(8, 4)}
    save_file(state | {f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "kohya.safetensors")
    code, told = validate(tmp_path / "kohya.safetensors")
    assert code == 2
    assert "expected transformer.LAYER.lora_A.weight and transformer.LAYER.lora_B.weight, found 2 weights with" in told
    assert f"kohya's format, first {name}.lora_down.weight, which diffusers does not convert for this model" in told
    assert "lora_up times alpha / rank to lora_B" in told


def test_an_alpha_that_is_no_number_is_refused(whole, tmp_path):
    with pytest.raises(ConfigurationError, match=r"x\.safetensors: its metadata makes no sense: lora\.alpha: .*nan"):
        lora_in_file(load_file(whole), {"transformer.lora_alpha": float("nan")}, tmp_path / "x.safetensors")
