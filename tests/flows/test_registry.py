"""Which model family serves which pipeline."""

import json

import diffusers
import pytest

from lightning_fdfo.commands.cli import FDFOCLI
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import DiffusersFlow, StableDiffusion3
from lightning_fdfo.flows.model_files import read_index
from lightning_fdfo.flows.registry import FlowFamily, family_for


def folder_of(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return str(tmp_path)


SERVED = {
    "StableDiffusion3Pipeline": "StableDiffusion3",
    "FluxPipeline": "Flux",
    "Flux2KleinPipeline": "Flux2",
    "Flux2Pipeline": "Flux2",
    "QwenImagePipeline": "QwenImage",
    "ZImagePipeline": "ZImage",
    "SanaPipeline": "Sana",
}


@pytest.mark.parametrize(("pipeline", "family"), SERVED.items())
def test_the_pipeline_names_the_family(tmp_path, pipeline, family):
    flow = DiffusersFlow(folder_of(tmp_path, pipeline), dtype="bfloat16")
    assert type(flow).__name__ == family
    assert str(flow.dtype) == "torch.bfloat16"
    flow.validate()


@pytest.mark.parametrize(("pipeline", "family"), SERVED.items())
def test_diffusers_has_the_pipeline_and_the_family_says_what_it_needs(pipeline, family):
    assert hasattr(diffusers, pipeline)
    served = FlowFamily.registered[pipeline]
    assert served.__name__ == family
    assert served.lora_targets
    assert served.block_names
    assert served.sequence_length > 0


def test_a_pipeline_that_no_family_serves_is_told_with_those_that_are(tmp_path):
    folder = folder_of(tmp_path, "StableDiffusionXLPipeline")
    with pytest.raises(ConfigurationError) as error:
        DiffusersFlow(folder)
    message = str(error.value)
    assert "holds a StableDiffusionXLPipeline, which no model family serves" in message
    assert all(name in message for name in SERVED)
    assert "docs/model_families.md" in message


def test_a_family_refuses_another_ones_pipeline(tmp_path):
    with pytest.raises(ConfigurationError, match="holds a FluxPipeline, StableDiffusion3 expected a StableDiffusion3"):
        StableDiffusion3(folder_of(tmp_path, "FluxPipeline")).validate()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"_class_name": 3}'])
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ConfigurationError, match="model_index"):
        read_index(str(tmp_path), None)


def test_an_heir_does_not_take_its_parents_place():
    class Heir(StableDiffusion3):
        pass

    assert family_for("tiny-digits") is StableDiffusion3
    assert type(Heir("tiny-digits")) is Heir


CONFIG = """
model:
  flow: {flow}
  rewards: {{JPEGSize: 1.0}}
data: {{train: configs/prompts/digits_train.txt}}
"""


@pytest.mark.parametrize(
    ("flow", "dtype"),
    [
        ("{pretrained: tiny-digits}", "float32"),
        ("{pretrained: tiny-digits, dtype: bfloat16}", "bfloat16"),
        ("{class_path: StableDiffusion3, init_args: {pretrained: tiny-digits, dtype: bfloat16}}", "bfloat16"),
    ],
)
def test_a_configuration_names_the_model_alone_or_the_class(tmp_path, flow, dtype, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(flow=flow))
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    cli = FDFOCLI(["--config", str(path), "--trainer.accelerator", "cpu"], run=False)
    assert type(cli.model.flow) is StableDiffusion3
    assert str(cli.model.flow.dtype) == f"torch.{dtype}"


def test_a_word_on_the_command_line_changes_one_setting(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(flow="{pretrained: tiny-digits, max_sequence_length: 0}"))
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    words = ["--config", str(path), "--trainer.accelerator", "cpu", "--model.flow.dtype", "float16"]
    flow = FDFOCLI(words, run=False).model.flow
    assert (str(flow.dtype), flow.max_sequence_length) == ("torch.float16", 0)
