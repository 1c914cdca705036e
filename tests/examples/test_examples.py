"""The examples run as they stand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import processes

ROOT = Path(__file__).parents[2]
PARTS = (("train", "train"), ("val", "heldout"))


def test_training_without_the_cli_is_the_same_run(tmp_path):
    """From a folder whose prompt files are the shipped ones, cut short: most of the time is validation's."""
    script, config = ROOT / "examples/train_without_cli.py", ROOT / "configs/quickstart.yaml"
    assert len(script.read_text().splitlines()) <= 40
    (tmp_path / "configs/prompts").mkdir(parents=True)
    for name in ("digits_train.txt", "digits_heldout.txt"):
        lines = (ROOT / "configs/prompts" / name).read_text().splitlines()[:12]
        (tmp_path / "configs/prompts" / name).write_text("\n".join(lines))
    subprocess.run([sys.executable, script, "plain", "1"], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    data = [f"--data.{part}={tmp_path}/configs/prompts/digits_{name}.txt" for part, name in PARTS]
    processes.run_checked(
        ["fit", "--config", config, *data, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path / 'cli'}"]
    )
    plain, cli = (load_file(tmp_path / run / "lora/pytorch_lora_weights.safetensors") for run in ("plain", "cli"))
    assert set(plain) == set(cli)
    assert all(torch.equal(value, cli[name]) for name, value in plain.items())
    assert (tmp_path / "plain/before.png").read_bytes() == (tmp_path / "cli/before.png").read_bytes()


@pytest.fixture
def pretrain(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples/pretrain_tiny")
    import pretrain

    return pretrain


def test_pretraining_writes_a_pipeline_that_the_adapter_loads(pretrain, monkeypatch, tmp_path):
    from lightning_fdfo.flows import StableDiffusion3

    arguments = ["pretrain.py", f"--output={tmp_path}/model", "--steps=2", "--autoencoder_steps=4", "--num_images=64"]
    monkeypatch.setattr(sys, "argv", arguments)
    pretrain.main()
    flow = StableDiffusion3(str(tmp_path / "model"), max_sequence_length=0)
    flow.load()
    assert torch.isfinite(flow.decode(torch.zeros(1, *flow.latent_shape(32, 64)))).all()
    shipped = ROOT / "lightning_fdfo/assets/tiny-digits"
    for part in ("transformer", "vae", "text_encoder"):
        ours, theirs = (
            json.loads((folder / part / "config.json").read_text()) for folder in (tmp_path / "model", shipped)
        )
        for config in (ours, theirs):
            config.pop("scaling_factor", None)
            config.pop("shift_factor", None)
        assert ours == theirs


def test_the_prompt_files_are_what_the_script_writes(pretrain, monkeypatch, tmp_path):
    import make_prompts

    monkeypatch.setattr(sys, "argv", ["make_prompts.py", str(tmp_path)])
    make_prompts.main()
    for name in ("digits_train.txt", "digits_heldout.txt"):
        assert (tmp_path / name).read_text() == (ROOT / "configs/prompts" / name).read_text()


def test_training_pictures_leave_out_what_seven_divides(pretrain):
    import digits

    images, prompts = digits.draw_many(300, seed=1)
    assert images.shape == (300, 32, 64, 3)
    assert not any(int(prompt.split('"')[1]) % 7 == 0 for prompt in prompts)
    assert np.ptp(images.reshape(300, -1), axis=1).min() > 100
