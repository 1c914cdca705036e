"""The doctor: a healthy run, and one fault for each thing that it looks at."""

import json
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_fdfo import LoRA, PromptDataModule, Reward, Sampling
from lightning_fdfo.__main__ import main
from lightning_fdfo.commands.doctor import Examination, before_loading
from lightning_fdfo.commands.doctor_probes import Finding
from lightning_fdfo.people import People
from lightning_fdfo.reward.term import RewardTerm
from tests.conftest import ToyFlow, brightness


def examined(module, prompts_file, tmp_path):
    examination = Examination()
    trainer = Trainer(
        max_epochs=0,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[examination],
        default_root_dir=tmp_path,
    )
    data = PromptDataModule(str(prompts_file))
    findings = list(before_loading(module, data, trainer))
    if all(finding.ok for finding in findings):
        trainer.fit(module, data)
    return findings + examination.findings


def faults(findings):
    return [finding.text for finding in findings if not finding.ok]


def test_a_healthy_run(toy_module, prompts_file, tmp_path):
    findings = examined(toy_module(), prompts_file, tmp_path)
    assert faults(findings) == []
    text = "\n".join(finding.text for finding in findings)
    assert "5 prompts, each with what its rewards need" in text
    assert "16 pairs per epoch = 16 per device x 1; 2 updates of 64 points" in text
    assert "LoRA of rank 2 bound 2 layers: 182 weights train" in text
    assert "without churn the two latents of a pair differ by at most" in text
    assert "brightness: " in text
    assert "to 4 of 4 tensors" in text
    assert "main memory" in text
    assert "estimated memory" in text


def test_a_batch_is_of_the_size_that_training_takes(toy_module, prompts_file, tmp_path):
    """As large as an update, however large a batch may be."""
    findings = examined(toy_module(batch_size=10**9), prompts_file, tmp_path)
    assert faults(findings) == []
    assert any("the velocity of 64 stored points differs" in finding.text for finding in findings)


@pytest.mark.parametrize("others", [{}, {"brightness": RewardTerm(brightness, 0.0)}])
def test_people_are_not_asked(toy_module, prompts_file, tmp_path, others):
    module = toy_module(rewards={"people": RewardTerm(People(port=0)), **others})
    findings = examined(module, prompts_file, tmp_path)
    assert faults(findings) == []
    assert "people: not tried, it judges in training alone" in [finding.text for finding in findings]
    assert any(finding.text.startswith("brightness: ") for finding in findings) == bool(others)
    assert not (tmp_path / "votes.jsonl").exists()


@pytest.mark.parametrize(("updates", "said"), [(1, 1), (2, 0)])
def test_a_clip_range_without_effect_is_named(toy_module, prompts_file, tmp_path, updates, said):
    findings = examined(toy_module(updates_per_epoch=updates), prompts_file, tmp_path)
    sentence = "objective.clip_range has no effect with updates_per_epoch 1: a first update's ratio is 1"
    assert [finding.text for finding in findings].count(sentence) == said
    assert faults(findings) == []  # it is no fault


def test_nothing_is_left_behind(toy_module, prompts_file, tmp_path):
    module = toy_module()
    before = sorted(tmp_path.iterdir())
    examined(module, prompts_file, tmp_path)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert sorted(tmp_path.iterdir()) == before


class Drifting(ToyFlow):
    """Its velocity depends on whether gradients are wanted by somebody: replay sees another one."""

    calls = 0

    def velocity(self, latents, sigma, conditioning, guidance_scale=1.0):
        self.calls += 1
        return super().velocity(latents, sigma, conditioning) * (1 + 0.2 * (len(latents) > 2))


class Noisy(ToyFlow):
    def velocity(self, latents, sigma, conditioning, guidance_scale=1.0):
        return super().velocity(latents, sigma, conditioning) + torch.randn_like(latents)


class Detached(ToyFlow):
    def velocity(self, latents, sigma, conditioning, guidance_scale=1.0):
        velocity = super().velocity(latents, sigma, conditioning)
        return velocity.detach() + 0 * velocity


class Guideless(ToyFlow):
    guidance = "none"


class OutOfRange(Reward):
    range = (0.0, 0.1)

    def __call__(self, images, prompts, metadata):
        return brightness(images, prompts, metadata)


class Broken(Reward):
    def __call__(self, images, prompts, metadata):
        return torch.full((len(images),), float("nan"))


class NeedsText(Reward):
    required_metadata = ("text",)

    def __call__(self, images, prompts, metadata):
        return brightness(images, prompts, metadata)


def sampling(**options):
    return Sampling(num_steps=4, height=2, width=2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow": Drifting()}, "replayed in 32-true, the velocity of 32 stored points differs"),
        ({"flow": Noisy()}, "the velocity is not a function of its arguments"),
        ({"flow": Detached()}, "gives a gradient of norm 0"),
        ({"rewards": {"odd": RewardTerm(OutOfRange())}}, "odd: .* its range is 0 … 0.1"),
        ({"rewards": {"caption": RewardTerm(NeedsText())}}, r"prompts.txt:1: .*text"),
        ({"sampling": sampling(churn=0.0)}, "the two images of every pair are equal"),
        ({"num_pairs": 15, "updates_per_epoch": 7}, "updates_per_epoch"),
    ],
)
def test_each_fault_is_told(toy_module, prompts_file, tmp_path, options, message):
    found = faults(examined(toy_module(**options), prompts_file, tmp_path))
    assert found, "no fault was found"
    assert any(re.search(message, text) for text in found), found


def test_many_faulty_prompts_are_counted(toy_module, prompts_file, tmp_path):
    prompts_file.write_text("\n".join(f"cat {number}" for number in range(9)), encoding="utf-8")
    found = faults(examined(toy_module(rewards={"caption": RewardTerm(NeedsText())}), prompts_file, tmp_path))
    assert len(found) == 6
    assert found[-1].endswith("4 more such prompts")


CONFIG = """
model:
  flow: {{pretrained: tiny-digits, max_sequence_length: 0}}
  rewards: {rewards}
  sampling: {{num_steps: 2, height: 32, width: 64, churn: 0.05}}
  batching: {{num_pairs: 4, updates_per_epoch: 1, batch_size: 4}}
  lora: {lora}
data: {{train: {prompts}}}
trainer: {{accelerator: cpu, devices: 1, default_root_dir: {folder}}}
"""


@pytest.fixture
def config(tmp_path):
    def write(rewards="{JPEGSize: 1.0}", lora="{rank: 4, alpha: 4}", rows=({"prompt": '"427" in red'},)):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        path = tmp_path / "config.yaml"
        path.write_text(CONFIG.format(rewards=rewards, lora=lora, prompts=prompts, folder=tmp_path / "run"))
        return str(path)

    return write


def run(arguments):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    return stop.value.code


def test_the_command_finds_a_healthy_run_healthy(config, tmp_path, capsys):
    assert run(["--config", config()]) == 0
    output = capsys.readouterr().out
    assert "LoRA of rank 4 bound 31 layers" in output
    assert "Ready to train." in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": "{rank: 4, alpha: 4, targets: [attn.to_w]}"}, "'attn.to_w' matches no linear layer"),
        ({"rewards": "{tests.commands.test_doctor.Broken: 1.0}"}, "tests.commands.test_doctor.Broken"),
        ({"rewards": "{OCR: 1.0}", "rows": ({"prompt": "no text in quotes"},)}, "prompts.jsonl:1"),
    ],
)
def test_the_command_tells_faults_and_fails(config, capsys, options, message):
    assert run(["--config", config(**options)]) == 1
    output = capsys.readouterr().out
    assert "FAIL" in output
    assert message in output
    assert "1 fault" in output


def test_callbacks_that_fit_would_refuse(config, capsys, tmp_path):
    callback = "[{class_path: lightning_fdfo.callbacks.LoRAExport}]"
    arguments = ["--config", config(lora="null"), f"--trainer.callbacks={callback}"]
    assert run(arguments) == 1
    assert "LoRAExport needs a module that trains a LoRA" in capsys.readouterr().out


def test_whatever_happens_what_was_found_before_is_told(config, capsys, monkeypatch):
    def explode(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("lightning_fdfo.commands.doctor_probes.start_rollout", explode)
    assert run(["--config", config()]) == 1
    output = capsys.readouterr().out
    assert "estimated memory" in output
    assert "OutOfMemoryError: CUDA out of memory" in output


def test_nothing_that_the_command_line_adds_for_a_run_is_left(config, monkeypatch):
    left = []

    def look(module, data, trainer, callbacks):
        left.extend(type(callback) for callback in trainer.callbacks)
        return [Finding(False, "no need to load the model")]

    monkeypatch.setattr("lightning_fdfo.commands.doctor.before_loading", look)
    assert run(["--config", config()]) == 1
    assert [kind for kind in left if kind.__module__.startswith("lightning_fdfo.")] == [Examination]


def test_a_runs_own_record_will_do(config, tmp_path, capsys):
    lines = Path(config()).read_text() + "ckpt_path: last\nweights_only: null\n"
    (tmp_path / "record.yaml").write_text(lines)
    assert run(["--config", str(tmp_path / "record.yaml")]) == 0


def test_a_mistyped_key_ends_as_it_does_for_fit(config, capsys):
    assert run(["--config", config(), "--model.num_pair", "4"]) == 2
    assert "num_pair" in capsys.readouterr().err


def test_guidance_that_a_model_does_not_have(toy_module, prompts_file, tmp_path):
    module = toy_module(flow=Guideless(), sampling=sampling(churn=0.1, guidance_scale=3.0))
    with pytest.raises(ValueError, match="this model has no guidance"):
        examined(module, prompts_file, tmp_path)


def test_dropout_does_not_disturb_the_examination(toy_module, prompts_file, tmp_path):
    module = toy_module(lora=LoRA(rank=2, alpha=4, dropout=0.5))
    assert faults(examined(module, prompts_file, tmp_path)) == []


def test_a_reward_that_the_first_prompt_does_not_go_to_is_not_tried(toy_module, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a cat", "rewards": {"brightness": 1}}\n{"prompt": "the dog"}\n', encoding="utf-8")
    rewards = {"brightness": RewardTerm(brightness), "other": RewardTerm(brightness, scale="std")}
    findings = examined(toy_module(rewards=rewards), prompts, tmp_path)
    assert faults(findings) == []
    assert "other: not tried, the first prompt's rewards do not name it" in [finding.text for finding in findings]
