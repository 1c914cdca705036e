"""Numbers that are not finite: refused as settings, found where they are made, named, and never kept."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from lightning_fdfo import Evaluation, FailurePolicy, LoRA, Objective, Sampling
from lightning_fdfo.__main__ import main
from lightning_fdfo.callbacks import EMA, LoRAExport
from lightning_fdfo.callbacks.reward_hacking_monitor import Band
from lightning_fdfo.errors import ConfigurationError, DivergenceError
from lightning_fdfo.export.trained import trained_weights
from lightning_fdfo.flows import DiffusersFlow, resolve_pretrained
from lightning_fdfo.flows.latents import to_unit_range
from lightning_fdfo.remote import RemoteReward
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.term import RewardTerm
from tests.commands.test_cli import SMALL
from tests.conftest import ToyFlow, brightness

ROOT = Path(__file__).parent.parent
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs a command on the quick start's configuration; returns its exit code and standard error."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-fdfo"])

    def run(name, *more):
        config = ["--config", "configs/quickstart.yaml", f"--trainer.default_root_dir={tmp_path / 'run'}"]
        with pytest.raises(SystemExit) as stop:
            main([name, *config, *SMALL, *more])
        return stop.value.code, capsys.readouterr().err

    return run


def error_lines(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


# Settings


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("sampling.churn", lambda value: Sampling(churn=value)),
        ("sampling.initial_churn", lambda value: Sampling(initial_churn=value)),
        ("sampling.guidance_scale", lambda value: Sampling(guidance_scale=value)),
        ("objective.clip_range", lambda value: Objective(clip_range=value)),
        ("objective.kl_weight", lambda value: Objective(kl_weight=value)),
        ("lora.alpha", lambda value: LoRA(alpha=value)),
        ("lora.dropout", lambda value: LoRA(dropout=value)),
        ("max_dropped", lambda value: FailurePolicy(max_dropped=value)),
        ("confidence", lambda value: Evaluation(confidence=value)),
        ("EMA: decay", lambda value: EMA(decay=value)),
        ("RewardHackingMonitor", lambda value: Band(value=(value, None)).check("image/saturation")),
        ("timeout", lambda value: RemoteReward("http://127.0.0.1:1", timeout=value)),
        ("backoff", lambda value: RemoteReward("http://127.0.0.1:1", backoff=value)),
        ("weight", lambda value: RewardMix({"a": RewardTerm(brightness, weight=value)})),
        ("scale", lambda value: RewardMix({"a": RewardTerm(brightness, scale=value)})),
        ("clip", lambda value: RewardMix({"a": RewardTerm(brightness, clip=value)})),
    ],
)
def test_a_setting_that_is_not_finite_is_refused_where_it_is_set(name, build, value):
    with pytest.raises(ConfigurationError, match=re.escape(name)):
        build(value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.sampling.churn=.inf", "sampling.churn: expected a finite number of at least 0, got inf"),
        ("--model.sampling.guidance_scale=.nan", "sampling.guidance_scale: expected a finite number, got nan"),
        ("--model.lora.alpha=.nan", "lora.alpha: expected a finite number above 0, got nan"),
        ("--trainer.gradient_clip_val=.nan", "trainer.gradient_clip_val: expected above 0, or null for none, got nan"),
    ],
)
def test_the_command_says_so_in_one_line_and_loads_nothing(command, monkeypatch, tmp_path, option, message):
    monkeypatch.setattr(DiffusersFlow, "load", lambda self: pytest.fail("the model was loaded"))
    code, told = command("fit", option)
    assert code == 2
    assert message in told
    assert len(error_lines(told)) == 1
    assert "Traceback" not in told


# Latents and images


class BrokenFlow(ToyFlow):
    """Its velocity or its image of some prompts is not finite, from some sigma down."""

    def __init__(self, letter="t", sigma=0.5, value=NAN, decodes=True):
        super().__init__()
        self.letter, self.sigma, self.value, self.decodes = letter, sigma, value, decodes

    def velocity(self, latents, sigma, conditioning, guidance_scale=1.0):
        velocity = super().velocity(latents, sigma, conditioning, guidance_scale)
        rows = conditioning.tensors["embeds"][:, 1] == torch.tensor(ord(self.letter) / 100)
        broken = rows & (torch.as_tensor(sigma).expand(len(rows)) <= self.sigma)
        return velocity.masked_fill(broken.view(-1, 1, 1, 1), self.value)

    def decode(self, latents):
        images = super().decode(latents)
        return images if self.decodes else images.masked_fill(torch.arange(len(images)).view(-1, 1, 1, 1) == 1, NAN)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_rollout_names_epoch_pair_prompt_step_and_sigma(toy_module, fit, value):
    with pytest.raises(DivergenceError) as error:
        fit(toy_module(flow=BrokenFlow(value=value)), 1)
    expected = r"epoch 0, pair \d+, prompt 'the dog': the velocity is not finite from step 3 of 4 \(sigma 0\.5\) on; "
    assert re.match(expected + r"[2468] of 16 images of this batch", str(error.value))


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_what_is_judged_is_looked_at_too(toy_module, judge, command):
    with pytest.raises(DivergenceError, match=r"prompt 'the dog' \(.*prompts\.txt:2\): .* step 1 of 4 \(sigma 1\) on"):
        judge(toy_module(flow=BrokenFlow(sigma=1.0)), command)


def test_validation_within_a_run_too(toy_module, fit, prompts_file):
    with pytest.raises(DivergenceError, match=r"prompt 'the dog' .* step 3 of 4"):
        fit(toy_module(flow=BrokenFlow()), 1, val=str(prompts_file))


def test_an_image_that_is_not_finite_is_named(toy_module, judge):
    flow = BrokenFlow(letter="-", decodes=False)
    with pytest.raises(DivergenceError, match=r"prompt 'the dog' .*: the decoded image after 4 steps are not finite"):
        judge(toy_module(flow=flow), "validate")


def test_a_text_that_is_encoded_to_nan_is_told(toy_module, judge):
    class Texts(ToyFlow):
        def encode(self, prompts, negative_prompts=None):
            conditioning = super().encode(prompts)
            conditioning.tensors["embeds"][2] = NAN
            return conditioning

    with pytest.raises(DivergenceError, match=r"prompt 'some bird' .*: its encoded text \(embeds\) is not finite"):
        judge(toy_module(flow=Texts()), "validate")


def test_an_infinite_pixel_is_no_colour():
    assert to_unit_range(torch.tensor([-INF, INF, NAN])).isnan().all()


# Weights of the base model


@pytest.mark.parametrize(("part", "number"), [("transformer", NAN), ("vae", INF), ("text_encoder", NAN)])
def test_a_model_folder_with_a_number_that_is_not_finite_fails_at_load(command, tmp_path, part, number):
    folder = tmp_path / "model"
    shutil.copytree(resolve_pretrained("tiny-digits"), folder)
    (file,) = (folder / part).glob("*.safetensors")
    file.chmod(0o644)
    state = load_file(file)
    name = next(name for name in sorted(state) if name.endswith("weight"))
    state[name].view(-1)[0] = number
    save_file(state, file, metadata={"format": "pt"})
    code, told = command("fit", f"--model.flow.init_args.pretrained={folder}")
    assert code == 2
    assert re.search(rf"{part}\.\S+ \(1 of its \d+ numbers is not finite\): the file is damaged", told)
    assert len(error_lines(told)) == 1


# Weights that train


def test_a_learning_rate_of_1e30_ends_with_an_error_and_leaves_nothing(command, tmp_path):
    code, told = command("fit", "--trainer.max_epochs=2", "--model.optimizer.init_args.lr=1e30")
    assert code == 1
    assert "not finite" in error_lines(told)[0]
    assert "smaller learning rate" in error_lines(told)[0]
    assert "Traceback" not in told
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


class Break(Callback):
    """Makes a trained weight NaN in an epoch, after the optimiser's step."""

    def __init__(self, epoch, factor=NAN):
        self.epoch, self.factor = epoch, factor

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and trainer.is_last_batch:
            weight = [parameter for parameter in pl_module.parameters() if parameter.requires_grad][-1]
            weight.data.view(-1)[-1] *= self.factor


def saving(folder, **options):
    return ModelCheckpoint(folder, "good", save_on_train_epoch_end=True, enable_version_counter=False, **options)


@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 1}, {"save_on_exception": True}], ids=str)
def test_the_checkpoint_of_the_epoch_before_stays(toy_module, fit, tmp_path, options):
    if "every_n_train_steps" in options:
        save = ModelCheckpoint(tmp_path / "saved", "good", enable_version_counter=False, **options)
    else:
        save = saving(tmp_path / "saved", **options)
    with pytest.raises(
        DivergenceError, match=r"(1 of \d weights are|weights are) not finite(: | after it, first )flow"
    ):
        fit(toy_module(), 3, callbacks=[save, Break(1)], enable_checkpointing=True)
    files = list((tmp_path / "saved").iterdir())
    assert files
    for file in files:
        saved = torch.load(file, weights_only=True)
        assert saved["epoch"] <= 1
        assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_weights_that_are_finite_and_of_no_use_are_noticed_at_the_epochs_end(toy_module, fit, tmp_path):
    save = saving(tmp_path / "saved")
    flow = ToyFlow()
    flow_velocity = flow.velocity
    flow.velocity = lambda *arguments: flow_velocity(*arguments) * INF if flow.broken else flow_velocity(*arguments)
    flow.broken = False

    class Overflow(Callback):
        def on_train_batch_end(self, trainer, *_):
            flow.broken = trainer.current_epoch == 1 and trainer.is_last_batch

    with pytest.raises(DivergenceError, match=r"epoch 1: with the weights after its last update, velocities are not"):
        fit(toy_module(flow=flow), 3, callbacks=[save, Overflow()], enable_checkpointing=True)
    assert torch.load(tmp_path / "saved" / "good.ckpt", weights_only=True)["epoch"] == 0


class NoGradient(Callback):
    """Makes every gradient NaN."""

    def on_after_backward(self, trainer, pl_module):
        next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan


@pytest.mark.filterwarnings("ignore:update .* it is skipped")
def test_a_run_that_has_skipped_all_its_updates_has_failed(toy_module, fit):
    with pytest.raises(DivergenceError, match="all 4 updates of this run were skipped"):
        fit(toy_module(max_skipped=10), 2, callbacks=[NoGradient()])


# Checkpoints and exports


@pytest.fixture
def saved(toy_module, fit, tmp_path):
    """A checkpoint of a toy run, which a test may spoil."""
    fit(toy_module(), 1, callbacks=[saving(tmp_path / "saved"), EMA(0.5)], enable_checkpointing=True)
    return tmp_path / "saved" / "good.ckpt"


def spoil(file, find):
    checkpoint = torch.load(file, weights_only=True)
    find(checkpoint).view(-1)[0] = NAN
    torch.save(checkpoint, file)


def a_weight(checkpoint):
    return checkpoint["state_dict"]["flow.transformer.first.lora_A.default.weight"]


def a_moment(checkpoint):
    return checkpoint["optimizer_states"][0]["state"][1]["exp_avg"]


def an_average(checkpoint):
    (average,) = (state["average"] for state in checkpoint["callbacks"].values() if "average" in state)
    return next(iter(average.values()))


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (a_weight, r"weights cannot be used: flow\.transformer\.first\.lora_A\.default\.weight \(1 of its"),
        (a_moment, r"optimiser's state cannot be used: exp_avg of weight 1 \(1 of its"),
        (an_average, r"EMA's average cannot be used: flow\.transformer\.first"),
    ],
    ids=["weight", "moment", "average"],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_with_nan_is_not_gone_on_with(saved, toy_module, fit, find, message):
    spoil(saved, find)
    with pytest.raises(ConfigurationError, match=message):
        fit(toy_module(), 2, ckpt_path=str(saved), callbacks=[EMA(0.5)])


def test_nor_judged_nor_exported(saved, toy_module, judge):
    spoil(saved, a_weight)
    with pytest.raises(ConfigurationError, match="weights cannot be used"):
        judge(toy_module(), "validate", ckpt_path=str(saved))
    spoil(saved, an_average)
    with pytest.raises(ConfigurationError, match="weights cannot be used"):
        trained_weights(saved)


def test_an_export_is_not_written_over_by_nan(toy_module, fit, tmp_path):
    class BreakAtTheEnd(Callback):
        def on_train_end(self, trainer, pl_module):
            next(p for p in pl_module.parameters() if p.requires_grad).data.view(-1)[0] = NAN

    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    fit(toy_module(), 1, callbacks=[LoRAExport()], enable_checkpointing=True)
    file.write_text("good")
    with pytest.raises(DivergenceError, match=r"not finite: flow\.transformer\.first\.lora_A.*nothing is written"):
        fit(toy_module(), 2, str(tmp_path / "checkpoints/last.ckpt"), enable_checkpointing=True,
            callbacks=[LoRAExport(), BreakAtTheEnd()])  # fmt: skip
    assert file.read_text() == "good"
