"""The command as a user types it: in processes of its own, on the shipped model and a reward that costs nothing."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml

from lightning_fdfo.__main__ import main
from lightning_fdfo.flows import DiffusersFlow
from tests import processes

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.rewards={JPEGSize: {reward: JPEGSize, weight: 1.0, scale: std}}",
    "--model.evaluation.metrics=null",
    "--model.sampling.num_steps=2",
    "--model.batching.num_pairs=4",
    "--model.batching.num_points_per_pair=null",
    "--model.batching.batch_size=8",
    "--model.batching.rollout_batch_size=1",
    "--trainer.check_val_every_n_epoch=1000",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
]


def command(*arguments):
    return [sys.executable, "-m", "lightning_fdfo", *arguments]


def fit_arguments(folder, *more):
    return ["fit", "--config", "configs/quickstart.yaml", f"--trainer.default_root_dir={folder}", *more]


def run(*arguments, optimise=False, check=True):
    """By Python itself, with all that its start brings."""
    line = command(*arguments)
    if optimise:
        line.insert(1, "-O")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two devices' threads would wait for each other
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if check and result.returncode:
        raise AssertionError(result.stdout[-2000:] + result.stderr[-4000:])
    return result


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def weights(folder):
    return last(folder)["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six epochs without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    processes.run_checked(fit_arguments(folder / "run", *SMALL, "--trainer.max_epochs=6"))
    return folder / "run"


def test_a_run_leaves_its_record(whole):
    record = yaml.safe_load((whole / "config.yaml").read_text())
    assert record["seed_everything"] == 0
    assert record["model"]["rewards"] == {"JPEGSize": {"reward": "JPEGSize", "weight": 1.0, "scale": "std"}}
    assert record["trainer"]["logger"][0]["init_args"]["save_dir"] == str(whole)
    assert (whole / "lora" / "pytorch_lora_weights.safetensors").stat().st_size > 0
    assert list(whole.glob("events.out.tfevents.*"))
    assert "reward/JPEGSize/mean" in (whole / "csv/version_0/metrics.csv").read_text()


def test_kill_and_resume_is_no_stop_to_the_bit(whole, tmp_path):
    """kill -9 in the middle of an epoch, then --ckpt_path last; callbacks are the shipped ones."""
    arguments = fit_arguments(tmp_path / "run", *SMALL, "--trainer.max_epochs=6")
    process = processes.start(arguments, (os.devnull, os.devnull))
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "run/pairs/epoch=002.csv").exists():  # by PairLog, once the third epoch is rolled out
            assert process.is_alive(), "ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.join()
    assert last(tmp_path / "run")["epoch"] in (1, 2, 3)
    begun = len(list((tmp_path / "run/pairs").glob("*.csv")))
    assert begun - 1 <= last(tmp_path / "run")["epoch"] + 1 <= begun, "no more than an epoch is done again"
    processes.run_checked([*arguments, "--ckpt_path=last"])
    assert lora(tmp_path / "run") == lora(whole)
    resumed, undisturbed = weights(tmp_path / "run"), weights(whole)
    assert set(resumed) == set(undisturbed)
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())
    scales = [last(folder)["reward_scales"] for folder in (whole, tmp_path / "run")]
    assert scales[0] == scales[1]
    assert scales[0]["JPEGSize"]["epoch"] == 5
    assert (tmp_path / "run/config-1.yaml").exists()


def lora(folder):
    return (folder / "lora/pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.slow
def test_python_o_changes_nothing(whole, tmp_path):
    arguments = fit_arguments(tmp_path / "run", *SMALL, "--trainer.max_epochs=6")
    run(*arguments, optimise=True)
    optimised = weights(tmp_path / "run")
    assert all(torch.equal(value, optimised[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize("package", ["lightning_fdfo", "rewards/lightning_fdfo_rewards"])
def test_nothing_hangs_on_what_python_o_takes_away(package):
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert), f"{file}:{node.lineno}"
            assert not (isinstance(node, ast.Name) and node.id == "__debug__"), f"{file}:{node.lineno}"


def test_two_processes_train_what_one_trains(tmp_path):
    """DDP on two processes (gloo): the same totals and scales, so the same weights up to summation order.

    Plain gradient descent and a reward without steps: Adam steps by a gradient's sign and a JPEG's size by whole bytes,
    so that rounding would grow, by how much depends on the processor.
    """
    smooth = [
        "--model.rewards={colours: {reward: Colorfulness, weight: 1.0, scale: std}}",
        "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1}}",
    ]
    runs = []
    for devices, batch_size in ((1, 8), (2, 4)):
        folder = tmp_path / str(devices)
        folder.mkdir()
        start = run if devices > 1 else lambda *words: processes.run_checked(words)
        start(
            *fit_arguments(folder / "run", *SMALL, *smooth, "--trainer.max_epochs=2"),
            f"--trainer.devices={devices}", "--trainer.strategy=ddp", f"--model.batching.batch_size={batch_size}",
        )  # fmt: skip
        runs.append(last(folder / "run"))
    one, two = (saved["reward_scales"]["colours"] for saved in runs)
    assert two["before"] == pytest.approx(one["before"], rel=1e-12)
    assert two["total"] == pytest.approx(one["total"], rel=1e-3)
    for name, value in runs[0]["state_dict"].items():
        torch.testing.assert_close(runs[1]["state_dict"][name], value, rtol=1e-4, atol=5e-5)


def test_a_folder_that_holds_a_run_is_not_overwritten(whole):
    result = processes.run(fit_arguments(whole, *SMALL))
    assert result.returncode == 2
    assert "holds a run already: resume it by --ckpt_path last" in result.stderr


def test_a_job_that_slurm_has_queued_anew_goes_on_by_the_same_command(tmp_path, monkeypatch, capsys):
    arguments = fit_arguments(tmp_path, *SMALL, "--trainer.callbacks=null", "--trainer.logger=false")
    main([*arguments, "--trainer.max_epochs=1"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(SystemExit):
        main([*arguments, "--trainer.max_epochs=2"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main([*arguments, "--trainer.max_epochs=2"])
    assert last(tmp_path)["epoch"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"], "and no other is written"
    assert yaml.safe_load((tmp_path / "config-1.yaml").read_text())["ckpt_path"] == "last"
    main([*fit_arguments(tmp_path / "new", *SMALL), "--trainer.callbacks=null", "--trainer.max_epochs=1"])


def test_last_without_a_last_checkpoint_is_no_silent_new_start(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(ROOT)
    arguments = fit_arguments(
        tmp_path, *SMALL, "--trainer.callbacks=null", "--trainer.logger=false", "--ckpt_path=last"
    )
    kept = tmp_path / "checkpoints/epoch=9.ckpt"
    kept.parent.mkdir()
    kept.touch()
    (tmp_path / "config.yaml").touch()  # of a run
    for command_name in ("fit", "validate"):
        with pytest.raises(SystemExit):
            main([command_name, *arguments[1:]])
        said = f"error: --ckpt_path last: {kept.parent} holds no last.ckpt, but epoch=9.ckpt: resume from one by "
        assert f"{said}--ckpt_path {kept}, or start from scratch in another folder" in capsys.readouterr().err
    kept.unlink()
    caplog.set_level("INFO")
    main([*arguments, "--trainer.max_epochs=1"])
    assert f"The run in {tmp_path} was ended before its first checkpoint: it starts again from epoch 0" in caplog.text
    assert last(tmp_path)["epoch"] == 0


@pytest.fixture
def files(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b'"7" in r\xf6d\n')
    (tmp_path / "untold.txt").write_text('"427" in red\na red cat\n')
    (tmp_path / "unknown.txt").write_text('"7\ue000" in red\n', encoding="utf-8")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.sampling.num_stepz=3", r"num_stepz"),
        ("--model.sampling.guidance=3", r"guidance"),
        ("--config={tmp}/typo.yaml", r"num_pears"),
        ("--model.rewards={{OCRR: 1.0}}", r"unknown reward 'OCRR' \(did you mean 'OCR'\?\)"),
        ("--data.train={tmp}/missing.txt", r"missing\.txt cannot be read: No such file"),
        ("--data.train={tmp}/empty.txt", r"empty\.txt is empty"),
        ("--data.train={tmp}/latin.txt", r"latin\.txt:1: not UTF-8"),
        ("--data.train={tmp}/untold.txt", r"untold\.txt:2: OCR needs"),
        ("--model.batching.updates_per_epoch=3", r"updates_per_epoch=3 must divide the 4 points of a pair"),
        ("--model.flow.init_args.pretrained={tmp}/folder", r"is no diffusers pipeline"),
        ("--model.flow.init_args.pretrained=tiny-digit", r"'tiny-digit', which is none of these"),
        ("--model.lora.targets=[attn.to_w]", r"'attn.to_w' matches no linear layer"),
        ("--model.lora.rank=0", r"rank: expected .* at least 1"),
        ("--model.lora=null", r"leave it out for full fine-tuning"),
        ("--model.sampling.churn=-1", r"churn: expected .* at least 0"),
        ("--model.rewards={{JPEGSize: .nan}}", r"rewards.JPEGSize: expected a weight"),
        (
            "--model.rewards={{a: {{reward: {{class_path: JPEGSize, init_args: {{quality: high}}}}}}}}",
            r"reward JPEGSize",
        ),
        (
            "--model.rewards={{a: {{reward: {{class_path: CLIPScore, init_args: {{pretrained: nobody/nothing}}}}}}}}",
            r"nobody/nothing .*cannot be fetched.*hf download nobody/nothing",
        ),
        ("--model.rewards={{a: {{reward: JPEGSize, scale: sdt}}}}", r"scale none, std or a number above 0"),
        ("--model.rewards={{exact_match: {{reward: OCR}}}}", r"\['exact_match'\] would be two"),
        ("--data.train={tmp}/unknown.txt", r"unknown\.txt:1: OCR: the recogniser does not know"),
        ("--trainer.num_sanity_val_steps=2", r"num_sanity_val_steps -1"),
        ("--trainer.precision=bf16-true", r"precision=bf16-true: expected one of 32-true, bf16-mixed"),
        ("--ckpt_path={tmp}/none.ckpt", r"expected a file, or last"),
        ("--ckpt_path=hpc", r"expected a file, or last"),
        ("--ckpt_path=last", r"holds no run to resume"),
    ],
)
def test_mistakes_end_in_one_clear_line(files, monkeypatch, capsys, option, message):
    """In this process, because fourteen starts take minutes; the next test starts one for real."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DiffusersFlow, "load_pipeline", load)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-fdfo"])
    (files / "typo.yaml").write_text("model: {batching: {num_pears: 3}}\n")
    with pytest.raises(SystemExit) as stop:
        main(fit_arguments(files / "run", "--trainer.enable_progress_bar=false", option.format(tmp=files)))
    assert stop.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, error), error
    assert not (files / "run" / "config.yaml").exists()


TWO = ["--trainer.devices=2", "--model.batching.batch_size=96"]


@pytest.mark.slow
def test_a_mistake_that_the_first_of_two_devices_sees_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    result = run(*fit_arguments(tmp_path, *TWO, "--model.rewards={CLIPScore: 1.0}"), check=False)
    said_once(result, "error: weights openai/clip-vit-large-patch14")


def test_a_mistake_that_both_devices_see_is_told_once(tmp_path):
    result = processes.run(fit_arguments(tmp_path, *TWO, "--model.batching.num_pairs=47"), devices=2)
    said_once(result, "error: num_pairs=47 does not divide over 2 devices; nearest: 46 or 48")


def said_once(result, message):
    assert result.returncode == 2, result.stderr[-2000:]
    assert result.stderr.count(message) == 1
    assert "Traceback" not in result.stderr


def test_overrides_reach_interpolated_values_and_several_files(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "model: {batching: {num_pairs: 96, batch_size: 96}}\ntrainer: {default_root_dir: from/overlay}\n"
    )
    result = processes.run_checked([
        "fit", "--config", "configs/quickstart.yaml", "--config", str(overlay), "--model.rewards.OCR", "0.3",
        "--print_config",
    ])  # fmt: skip
    config = yaml.safe_load(result.stdout)
    assert config["model"]["batching"]["num_pairs"] == 96
    assert config["model"]["rewards"] == {"OCR": 0.3}
    assert config["trainer"]["default_root_dir"] == "from/overlay"
    text = result.stdout
    assert "runs/quickstart" not in text


def test_validate_alone(tmp_path):
    prompts = tmp_path / "val.txt"
    prompts.write_text('"427" in red\n"12" in blue\n')
    result = processes.run_checked([
        "validate", "--config", "configs/quickstart.yaml", f"--data.val={prompts}",
        f"--trainer.default_root_dir={tmp_path}/run", *SMALL,
    ])  # fmt: skip
    assert "val/JPEGSize" in result.stdout
