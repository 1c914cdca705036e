"""What cannot fit is refused by the shipped configuration and the real command before a model is loaded."""

from __future__ import annotations

import re

import psutil
import pytest
import torch

from lightning_fdfo import LoRA
from lightning_fdfo.__main__ import main
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.guards import capacity, memory
from lightning_fdfo.guards.capacity import main_memory

QUICKSTART = ["--config", "configs/quickstart.yaml"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command on the quick start's configuration, which must end before the model's weights are read."""

    def no_loading(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(DiffusersFlow, "load_pipeline", no_loading)

    def run(word, *options):
        with pytest.raises(SystemExit) as stop:
            main([word, *QUICKSTART, "--trainer.default_root_dir", str(tmp_path / "run"), *options])
        assert not (tmp_path / "run" / "config.yaml").exists()
        output = capsys.readouterr()
        told = [line for line in output.err.splitlines() if line.startswith("error:")]
        return stop.value.code, told[0] if word != "doctor" and len(told) == 1 else output.out

    return run


CASES = [
    (
        ("batching.num_pairs", "1000000000000"),
        r"takes at least \d+\.\d TiB of main memory, which has .*num_pairs=1000000000000",
    ),
    (("sampling.num_steps", "1000000000000"), r"at least \d+\.\d TiB of main memory, .*num_steps=1000000000000"),
    (("lora.rank", "100000"), r"lora.rank: expected at most 96, .* got 100000"),
    (("sampling.height", "4096"), r"expected at most 64 pixels, for this model has positions for 8 tokens a side"),
    (("sampling.width", "96"), r"expected at most 64 pixels, .* got 32 x 96"),
    (("sampling.width", "65"), r"must be multiples of 8, got 32 x 65; nearest: 32 x 64"),
    (("flow.max_sequence_length", "-3"), r"expected 0 to 512 tokens, got -3"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[f"{case[0][0]}-{case[0][1]}" for case in CASES])
def test_fit_refuses_in_one_line(command, change, message):
    name, value = change
    code, told = command("fit", f"--model.{name}", value)
    assert code == 2
    assert re.search(message, told), told


def test_validation_refuses_a_size_too(command):
    code, told = command("validate", "--model.sampling.width", "96")
    assert code == 2
    assert "expected at most 64 pixels" in told


def test_doctor_says_the_same(command):
    code, told = command("doctor", "--model.batching.num_pairs", "1000000000000")
    assert code == 1
    assert "this run cannot fit: it takes at least" in told
    code, told = command("doctor", "--model.sampling.width", "96")
    assert code == 1
    assert "expected at most 64 pixels" in told


# On the toy flow, which has no outline: once it is loaded


def test_a_flow_without_an_outline_is_looked_at_once_it_is_loaded(toy_module, fit):
    with pytest.raises(ConfigurationError, match="num_pairs=1600000000000"):
        fit(toy_module(num_pairs=16 * 10**11), 1)
    with pytest.raises(ConfigurationError, match=r"lora.rank: expected at most 15"):
        fit(toy_module(lora=LoRA(rank=16)), 1)


def test_a_rank_above_some_layers_is_told(toy_module, fit):
    with pytest.warns(UserWarning, match=r"lora.rank=13 is above the smaller side of 1 of 2 layers .*\(second: 12\)"):
        fit(toy_module(lora=LoRA(rank=13)), 1)


ROLLOUT = memory.rollout_bytes(16, 8, 12, 0)
"""Of the toy module."""


def test_only_what_is_certain_is_refused_and_what_is_likely_is_told(toy_module, fit, monkeypatch):
    monkeypatch.setattr(capacity, "main_memory", lambda: ROLLOUT)
    with pytest.raises(ConfigurationError, match="this run cannot fit"):  # the weights come on top
        fit(toy_module(), 1)
    monkeypatch.setattr(capacity, "main_memory", lambda: 27_000)  # 26 592 bytes are certain, 28 048 likely
    with pytest.warns(UserWarning, match="this run may not fit: it is likely to take"):
        fit(toy_module(), 1)
    monkeypatch.setattr(capacity, "main_memory", lambda: 100 * ROLLOUT)
    fit(toy_module(), 1)


def test_several_processes_of_a_machine_share_its_memory(toy_module, monkeypatch):
    module = toy_module()
    module.flow.load()

    class Trainer:
        world_size = num_devices = 4
        strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()

    monkeypatch.setattr(type(module), "trainer", Trainer())
    needs = capacity._at_rest(module, 12, 4)
    assert sum(one.least for one in needs) == ROLLOUT


def test_main_memory_is_the_machines_or_the_containers(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(capacity, "LIMITS", (str(limit),))
    for text, expected in (("max\n", psutil.virtual_memory().total), ("1048576\n", 2**20)):
        limit.write_text(text)
        assert main_memory() == expected
