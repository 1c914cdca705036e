"""Every configuration in configs/ parses strictly and can be instantiated without network or weights."""

from pathlib import Path

import pytest
import yaml

import lightning_fdfo.flows  # noqa: F401 - short class names
from lightning_fdfo.cli import FDFOCLI, FDFOArgumentParser
from lightning_fdfo.prompts import read_prompts

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = {"legible_and_small.yaml": "quickstart.yaml"}
"""Files that are laid over another one, as their head says."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configurations_can_be_built(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    built = []
    monkeypatch.setattr(FDFOCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    base = ROOT / "configs" / OVERLAYS.get(path.name, path.name)
    FDFOCLI(["fit", *(f"--config={part}" for part in dict.fromkeys((base, path)))])
    (cli,) = built
    assert isinstance(cli._subcommand_parsers["fit"], FDFOArgumentParser)
    assert not hasattr(cli.model.flow, "transformer")
    assert cli.model.seed == yaml.safe_load(base.read_text())["seed_everything"]
    for prompts in (cli.datamodule.train_path, cli.datamodule.val_path):
        assert len(read_prompts(prompts)) >= 256


def test_held_out_numbers_are_never_trained_on():
    train, held_out = (read_prompts(ROOT / f"configs/prompts/digits_{name}.txt") for name in ("train", "heldout"))
    numbers = [{int(prompt.text.split('"')[1]) for prompt in prompts} for prompts in (train, held_out)]
    assert not any(number % 7 == 0 for number in numbers[0])
    assert all(number % 7 == 0 for number in numbers[1])
    assert len(held_out) == 256
