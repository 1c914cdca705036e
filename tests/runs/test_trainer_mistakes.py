"""What a user can get wrong, or means rightly, through the Trainer, its callbacks and the parser: the real command."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_fdfo.__main__ import main
from tests.commands.test_cli import SMALL

ROOT = Path(__file__).parents[2]
SCHEDULING = "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 4}}}"
PLATEAU = "{class_path: lightning.pytorch.cli.ReduceLROnPlateau, init_args: {monitor: reward/mean}}"


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `fit` on the quick start's configuration, in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-fdfo"])

    def run(*options):
        folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
        main(["fit", "--config", "configs/quickstart.yaml", folder, *SMALL, "--trainer.max_epochs=1", *options])
        return tmp_path / "run"

    return run


TRAINER = {
    "--trainer.accelerator=gpu": r"trainer: No supported gpu backend found",
    "--trainer.accelerator=cdua": r"trainer\.accelerator: no accelerator is named cdua \(did you mean cuda\?\)",
    "--trainer.devices=0": r"trainer: .*devices='0'",
    "--trainer.strategy=fsdp": r"trainer: The strategy `fsdp` requires a GPU accelerator",
    "--trainer.strategy=deepspeed": r"trainer: .*must have DeepSpeed installed",
    "--trainer.strategy=dpp": r"trainer\.strategy: no strategy is named dpp \(did you mean ddp\?\); there are auto",
    "--trainer.strategy=ddp_spawn": r"trainer\.strategy: processes by spawn .* add configs/ddp\.yaml after",
    "--trainer.precision=17": r"trainer\.precision: expected 64, 32, .* or null, got 17",
    "--trainer.profiler=nope": r"trainer: .*can only be one of",
    "--trainer.gradient_clip_algorithm=norn": r"trainer: `gradient_clip_algorithm` norn is invalid",
    "--trainer.max_epochs=-2": r"trainer: `max_epochs` must be a non-negative integer or -1",
    "--trainer.limit_val_batches=2.5": r"trainer: .*limit_val_batches",
    "--trainer.limit_train_batches=0.5": r"trainer\.limit_train_batches=0\.5: an epoch is 1 updates of 2 batches",
    f"--trainer.callbacks+={SCHEDULING}": r"GradientAccumulationScheduler cannot be used: .*leave it out",
    "--trainer.callbacks+=EMAWeightAveraging": r"EMAWeightAveraging cannot be used: .*lightning_fdfo\.callbacks\.EMA",
    "--trainer.callbacks=[{class_path: ModelCheckpoint}, {class_path: ModelCheckpoint}]": r"ModelCheckpoint comes",
    "--trainer.callbacks=[{class_path: EMA}, {class_path: EMA}]": r"EMA comes twice, as number 0 and 1",
    "--trainer.callbacks={class_path: EMA, init_args: {decay: 2}}": r"EMA: decay: expected .* below 1, got 2",
    "--trainer.callbacks={class_path: Timer, init_args: {duration: 5 minutes}}": r"trainer\.callbacks: Timer: .*DD:HH",
    "--trainer.logger={class_path: WandbLogger}": r"trainer\.logger: WandbLogger: .*wandb",
    "--seed_everything=-1": r"seed_everything: expected a number from 0 to 4294967295, .* got -1",
    "--seed_everything=4294967296": r"seed_everything: expected a number from 0 to 4294967295, .* got 4294967296",
    "--seed_everything=true": r"seed_everything: expected a number .* got True",
    "--model.optimizer.init_args.lr=-1": r"model\.optimizer: AdamW: Invalid learning rate: -1",
    "--model.optimizer=SparseAdam": r"model\.optimizer: SparseAdam: .*dense gradients",
    "--model.optimizer=LBFGS": r"model\.optimizer: LBFGS evaluates the loss several times",
    f"--model.lr_scheduler={PLATEAU}": r"model\.lr_scheduler: ReduceLROnPlateau follows a measured number",
}
PARSER = {
    "--config={tmp}/rnk.yaml": r"rnk\.yaml: model\.lora\.rnk: no such option of LoRA \(did you mean rank\?\); there",
    "--config={tmp}/decy.yaml": r"decy\.yaml: trainer\.callbacks\.1\.init_args\.decy: no such option of EMA \(did",
    "--config={tmp}/modle.yaml": r"modle\.yaml: modle\.lora: no such option \(did you mean model\?\); there are",
    "--model.lora.rnk=3": r"error: model\.lora\.rnk: no such option of LoRA \(did you mean rank\?\)",
    "--model.batching.num_pears=3": r"no such option of model.batching \(did you mean num_pairs\?\); .*batch_size",
    "--trainer.max_epoch=3": r"trainer\.max_epoch: no such option of trainer \(did you mean max_epochs or",
    "--model.optimizer=AdamX": r"model\.optimizer: no class is named AdamX \(did you mean Adam",
    "--model.optimizer=torch.optim.AdamX": r"model\.optimizer: torch\.optim\.AdamX cannot be imported: .*\(did you",
    "--model.optimizer={{class_path: AdamW, init_args: {{lr: high}}}}": r"model\.optimizer: AdamW: lr: expected float",
    "--model.lr_scheduler=StepLR": r"model\.lr_scheduler: StepLR needs step_size",
    "--model.lr_scheduler=ReduceLROnPlateau": r"model\.lr_scheduler: ReduceLROnPlateau may be torch\.optim\..+ or",
    "--model.flow=StableDifusion3": r"model\.flow: no class is named StableDifusion3 \(did you mean StableDiffusion",
    "--trainer.callbacks+=EMAA": r"trainer\.callbacks: no class is named EMAA \(did you mean EMA\?\)",
    "--trainer.callbacks+=no.module.Thing": r"trainer\.callbacks: no\.module\.Thing cannot be imported: No module",
    "--trainer.callbacks=torch.optim.AdamW": r"trainer\.callbacks: expected a Callback, got torch\.optim\.AdamW",
    "--trainer.logger=Tensorbord": r"trainer\.logger: no class is named Tensorbord \(did you mean TensorBoard",
    "--trainer.max_epochs=ten": r"trainer\.max_epochs: expected int or null, got ten",
    "--trainer.max_epochs=": r"trainer\.max_epochs: expected int or null, got nothing",
    "--model.objective.normalization=mean": r"normalization: expected mean_square or root_mean_square, got mean",
    "--model.rewards={{a: {{reward: JPEGSiz}}}}": r"unknown reward 'JPEGSiz' \(did you mean 'JPEGSize'\?\)",
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "rnk.yaml").write_text("model: {lora: {rnk: 3}}\n")
    (tmp_path / "modle.yaml").write_text("modle: {lora: null}\n")
    callbacks = [{"class_path": "PairLog"}, {"class_path": "EMA", "init_args": {"decy": 0.9}}]
    (tmp_path / "decy.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return tmp_path


@pytest.mark.parametrize("option", TRAINER | {option.format(tmp="{tmp}"): text for option, text in PARSER.items()})
def test_a_mistake_is_one_line_before_a_model_is_loaded(option, command, files, monkeypatch, capsys):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lightning_fdfo.flows.StableDiffusion3.load", load)
    with pytest.raises(SystemExit) as stop:
        command(option.replace("{tmp}", str(files)))
    assert stop.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    messages = TRAINER | {key.format(tmp="{tmp}"): text for key, text in PARSER.items()}
    assert re.search(messages[option], error), error
    assert len(error) < 420, error
    assert not re.search(r"Union|typing\.|<class|Subtypes", error), error
    assert [path.name for path in (files / "run").glob("*") if path.name != ".lock"] == []


def test_a_bug_keeps_its_traceback(command, monkeypatch):
    def broken(*_):
        raise KeyError("of ours")

    monkeypatch.setattr("lightning_fdfo.module.FDFOModule.plan", property(broken))
    with pytest.raises(KeyError, match="of ours"):
        command()


def test_callbacks_that_are_added_stand_beside_those_of_the_file(command, capsys):
    with pytest.raises(SystemExit):
        command("--trainer.callbacks+=EMA", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    shipped = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())["trainer"]["callbacks"]
    named = [callback["class_path"] for callback in printed]
    assert named == [*(callback["class_path"] for callback in shipped), "lightning_fdfo.callbacks.EMA"]


def test_barebones_leaves_out_what_the_file_brings(command):
    folder = command("--trainer.barebones=true")
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "run.json", ".lock"}


def test_what_is_switched_off_is_left_out(command):
    """The file's checkpoints, and a callback that would need the logger; the LoRA is written all the same."""
    off = ["--trainer.enable_checkpointing=false", "--trainer.logger=false"]
    folder = command(*off, "--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=RichProgressBar")
    assert not list(folder.glob("**/*.ckpt"))
    assert not list(folder.glob("**/metrics.csv"))
    assert (folder / "lora/pytorch_lora_weights.safetensors").exists()


def test_a_checkpoint_of_weights_alone_is_not_gone_on_from(command, tmp_path, capsys):
    file = tmp_path / "weights.ckpt"
    torch.save(
        {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 0, "loops": {}}, file
    )
    with pytest.raises(SystemExit) as stop:
        command(f"--ckpt_path={file}")
    assert stop.value.code == 2
    assert re.search(r"weights\.ckpt holds weights only, .*validate", capsys.readouterr().err)
