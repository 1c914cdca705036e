"""Another class over a shipped configuration: which of the file's arguments still count is said."""

import logging

import pytest

import lightning_fdfo.flows  # noqa: F401 - so that a model family can be named by its class alone
from lightning_fdfo.commands.cli import FDFOCLI


@pytest.fixture
def said(monkeypatch, caplog):
    """What is said of the quick start's configuration with some words after it."""
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])

    def run(*words):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            FDFOCLI(["--config", "configs/quickstart.yaml", *words], run=False)
        return [record.message for record in caplog.records if " instead of a file's " in record.message]

    return run


def test_what_another_flow_keeps_is_said(said):
    expected = "model.flow: Flux instead of a file's StableDiffusion3: of that one's arguments pretrained=tiny-digits, "
    assert said("--model.flow.class_path", "Flux") == [f"{expected}max_sequence_length=0 are kept"]


def test_what_the_command_line_sets_is_not_kept(said):
    words = ["--model.flow.class_path", "Flux", "--model.flow.init_args.pretrained", "a/b"]
    assert said(*words, "--model.flow.max_sequence_length=77") == []


def test_another_optimiser_keeps_and_drops(said, tmp_path):
    file = tmp_path / "adam.yaml"
    file.write_text("model: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.1, amsgrad: true}}}")
    (told,) = said("--config", str(file), "--model.optimizer.class_path", "torch.optim.SGD")
    assert told.endswith("of that one's arguments lr=0.1, weight_decay=0.0001 are kept, amsgrad is dropped")


def test_a_file_of_the_class_itself_needs_no_word(said, tmp_path):
    file = tmp_path / "sgd.yaml"
    file.write_text("model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, weight_decay: 0.0}}}")
    assert said("--config", str(file)) == []
    assert said("--model.batching.num_pairs", "96") == []


def test_the_short_form_of_a_flow_counts(said, tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text("model: {flow: {pretrained: tiny-digits, vae_tiling: true}}")
    (told,) = said("--config", str(file), "--model.flow.class_path", "StableDiffusion3")
    assert "pretrained=tiny-digits" in told
    assert "vae_tiling=True" in told
